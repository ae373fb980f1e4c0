"""What holds for every model of every family, through its own pipeline class."""

from __future__ import annotations

import logging

import pytest
import torch
from family_cases import Case

from sla_video import SLAConfig, disable_sla, enable_sla, load_routers, save_routers

SPARSE = SLAConfig(sparsity=0.9, block_q=16, block_k=8)
EVERYTHING = SPARSE.replace(sparsity=0.0)


class Stock:
    """A pipeline of one case and what it makes without SLA."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.pipe = case.build()
        self.calls: dict[str, int] = {}
        hooks = [
            transformer.register_forward_pre_hook(self._count(name))
            for name, transformer in self.transformers.items()
        ]
        self.output = case.run(self.pipe)
        for hook in hooks:
            hook.remove()
        assert self.calls.keys() == self.transformers.keys()

    def _count(self, name):
        def hook(_module, _args):
            self.calls[name] = self.calls.get(name, 0) + 1

        return hook

    @property
    def transformers(self):
        names = ("transformer", "transformer_2")
        return {n: m for n in names if (m := getattr(self.pipe, n, None)) is not None}

    def run(self, **changes):
        return self.case.run(self.pipe, **changes)

    def error(self, output):
        return (output - self.output).norm() / self.output.norm()


def processors_of(transformer):
    # Not `attn_processors`, which some transformers lack.
    return {name: m.processor for name, m in transformer.named_modules() if hasattr(m, "processor")}


def layers_of(handle, component):
    return [layer for layer in handle.stats().layers if layer.name.startswith(f"{component}.")]


class FamilyChecks:
    """Tests that take `stock`, a fixture of the module over its cases."""

    def test_full_selection_equals_the_stock_output(self, stock):
        with enable_sla(stock.pipe, config=EVERYTHING) as handle:
            assert stock.error(stock.run()) < 2e-6
            for component, calls in stock.calls.items():
                layers = layers_of(handle, component)
                assert len(layers) == stock.case.layers
                for layer in layers:
                    assert layer.calls == calls
                    assert layer.dense_calls == (calls if stock.case.all_dense else 0)

    def test_sparse_attention_runs_and_is_gone_afterwards(self, stock, caplog):
        processors = {
            (component, name): processor
            for component, transformer in stock.transformers.items()
            for name, processor in processors_of(transformer).items()
        }
        with caplog.at_level(logging.WARNING, logger="sla_video"):
            handle = enable_sla(stock.pipe, config=SPARSE)
            output = stock.run()
        assert output.isfinite().all()
        warnings = [record.getMessage() for record in caplog.records]
        if stock.case.all_dense:
            assert torch.equal(output, stock.output)
            assert handle.stats().sparsity == 0
            assert len(warnings) == 1 and stock.case.all_dense in warnings[0]
        else:
            # A thousand times what rounding does.
            assert 2e-3 < stock.error(output) < 1
            # The shortest sequence is 48 tokens: 1 of 6 key blocks is kept.
            assert all(0.8 < layer.sparsity <= 0.92 for layer in handle.stats().layers)
            assert all(layer.dense_calls == 0 for layer in handle.stats().layers)
            assert warnings == []

        disable_sla(stock.pipe)
        for component, transformer in stock.transformers.items():
            for name, processor in processors_of(transformer).items():
                assert processor is processors[component, name]
        assert torch.equal(stock.run(), stock.output)

    def test_routers_are_saved_and_loaded_for_each_transformer(self, stock, tmp_path):
        generator = torch.Generator().manual_seed(3)
        with enable_sla(stock.pipe, config=SPARSE) as handle:
            untrained = stock.run()
            with torch.no_grad():
                for router in handle.routers.values():
                    for parameter in router.parameters():
                        parameter.add_(torch.randn(parameter.shape, generator=generator))
            trained = stock.run()
            save_routers(tmp_path, handle)
            expected = {
                name: router.query_proj.detach().clone() for name, router in handle.routers.items()
            }
        routers = load_routers(tmp_path)
        assert routers.models.keys() == stock.transformers.keys()
        with enable_sla(stock.pipe, tmp_path) as handle:
            assert len(handle.routers) == stock.case.layers * len(stock.transformers)
            for name, router in handle.routers.items():
                assert torch.equal(router.query_proj, expected[name])
            assert torch.equal(stock.run(), trained)
        assert torch.equal(trained, untrained) == (stock.case.all_dense is not None)

    def test_dense_steps_are_the_first_ones(self, stock):
        if "DiffusionForcing" in type(stock.pipe).__name__:
            with pytest.raises(ValueError, match="each frame has its own: use dense_steps=0"):
                enable_sla(stock.pipe, config=SPARSE, dense_steps=1)
            return
        # Video to video enters the schedule in the middle.
        half = "strength" in stock.case.call
        steps = []

        def see(_pipe, _step, _time, values):
            steps.append({name: layers_of(handle, name)[0].dense_calls for name in stock.calls})
            return values

        with enable_sla(stock.pipe, config=SPARSE, dense_steps=2) as handle:
            stock.run(num_inference_steps=6 if half else 4, callback_on_step_end=see)
        # Forwards of a step, in whichever transformer it belongs to: guidance may take another one.
        forwards = sum(stock.calls.values()) // (2 * stock.case.segments)
        dense = [sum(seen.values()) for seen in steps]
        each = len(dense) // stock.case.segments
        assert each == (3 if half else 4)
        assert dense == [
            forwards * (2 * segment + min(step + 1, 2))
            for segment in range(stock.case.segments)
            for step in range(each)
        ]
