"""The fit of one layer: its formula against the reference, and that it gains what can be gained."""

from __future__ import annotations

import pytest
import torch
from operator_inputs import dense_attention, random_qkv, random_router

from sla_video.calibration.capture import Capture
from sla_video.calibration.fit import fit_layer
from sla_video.calibration.fit_options import FitOptions
from sla_video.calibration.layer_data import LayerData, judge
from sla_video.calibration.row_tables import attend, build_tables
from sla_video.config import SLAConfig
from sla_video.kernels.api import exact_recall, sla2_attention
from sla_video.kernels.options import num_selected
from sla_video.pipelines.errors import InputError

BLOCK_Q, BLOCK_K = 16, 8
CONFIG = SLAConfig(block_q=BLOCK_Q, block_k=BLOCK_K)
BLOCKS = {"block_q": BLOCK_Q, "block_k": BLOCK_K}
CPU = torch.device("cpu")
# Seconds at these sizes; the defaults are for real layers.
SHORT = {"steps": 120, "blocks": 6, "rows": 8, "learning_rate": 2e-2}


def tables_of(call, blocks, *, rows=BLOCK_Q, phi_k="smoothed", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return build_tables(*call, blocks, rows=rows, phi_k=phi_k, generator=generator, **BLOCKS)


def reference(call, router, sparsity, tau, phi_k="smoothed", **options):
    selection = "top_k" if tau is None else "soft_top_k"
    return sla2_attention(
        *call,
        router,
        sparsity=sparsity,
        selection=selection,
        tau=tau or 0.1,
        phi_k=phi_k,
        impl="reference",
        **BLOCKS,
        **options,
    )


@pytest.mark.parametrize("tau", [None, 0.1, 1.0], ids=["hard", "tau=0.1", "tau=1"])
@pytest.mark.parametrize("length", [100, 128, 9])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"per_head": True},
        {"alpha": "per_block", "num_query_blocks": 5},
    ],
    ids=["shared", "per-head", "per-block"],
)
def test_tables_give_what_the_reference_gives(variant, length, tau):
    call = random_qkv(length, batch=2)
    router = random_router(**variant)
    num_query = -(-length // BLOCK_Q)
    blocks = sorted({0, num_query // 2, num_query - 1})
    for sparsity, phi_k in ((0.0, "smoothed"), (0.7, "smoothed"), (0.95, "raw")):
        tables = tables_of(call, blocks, phi_k=phi_k)
        result = attend(tables, router, num_selected(sparsity, tables.num_key_blocks), tau)
        expected, lse = reference(call, router, sparsity, tau, phi_k, return_lse=True)
        recall = exact_recall(call[0], call[1], lse)
        full = dense_attention(*call)
        for i, m in enumerate(blocks):
            rows = slice(m * BLOCK_Q, min(length, (m + 1) * BLOCK_Q))
            count = rows.stop - rows.start
            assert tables.row_weight[i].sum() == count
            for got, wanted in (
                (result.output[:, :, i, :count].transpose(1, 2), expected[:, rows]),
                (tables.target[:, :, i, :count].transpose(1, 2), full[:, rows]),
                (result.recall[:, :, i, :count], recall[:, :, rows]),
            ):
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


def test_tables_of_16_bits_stay_close():
    call = random_qkv(128)
    low = [x.to(torch.bfloat16) for x in call]
    exact = [x.double() for x in low]
    count = num_selected(0.7, 16)
    result = attend(tables_of(low, range(8)), None, count, None)
    # Where two scores tie within rounding the selections may differ: compare at the same one.
    expected = attend(tables_of(exact, range(8)), None, count, None)
    agree = (result.recall - expected.recall).abs().amax(-1) < 1e-3
    assert agree.float().mean() > 0.8
    error = (result.output - expected.output)[agree].norm() / expected.output[agree].norm()
    # Half a unit in the last place is 2^-9; what is summed here has averaged some of it out.
    assert 1e-5 < error < 2**-8


def test_sampled_rows_are_rows_of_their_blocks():
    call = random_qkv(100)
    every, few = tables_of(call, [1, 6]), tables_of(call, [1, 6], rows=5)
    assert few.target.shape[3] == 5
    # Block 6 holds the tokens 96 to 99: four rows, and one that does not count.
    assert few.row_weight.tolist() == [[1] * 5, [1] * 4 + [0]]
    distance = (few.target[0, 0, :, :, None] - every.target[0, 0, :, None]).abs().amax(-1)
    nearest = distance.min(-1)
    assert nearest.values[few.row_weight > 0].max() < 1e-12
    assert len(set(nearest.indices[0].tolist())) == 5


@pytest.mark.parametrize("alpha", ["adaptive", "per_block"])
def test_gradients_are_those_of_the_reference(alpha):
    call = random_qkv(64)
    kind = {"alpha": alpha, **({"num_query_blocks": 4} if alpha == "per_block" else {})}
    weights = torch.randn(1, 64, 2, 16, dtype=torch.float64)
    gradients = []
    for use_tables in (True, False):
        router = random_router(**kind)
        if use_tables:
            tables = tables_of(call, range(4))
            output = attend(tables, router, num_selected(0.7, 8), 0.5).output
            output = output.flatten(2, 3).transpose(1, 2)
        else:
            output = reference(call, router, 0.7, 0.5)
        (output * weights).sum().backward()
        gradients.append([parameter.grad for parameter in router.parameters()])
    for got, wanted in zip(*gradients, strict=True):
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-10)


def test_the_judge_measures_what_the_operator_does():
    calls = [Capture(*random_qkv(100, seed=seed, dtype=torch.float32)) for seed in (0, 1)]
    options = FitOptions(blocks=7, held_out_rows=BLOCK_Q)
    data = LayerData(calls, held_out=1, config=CONFIG, options=options, device=CPU, seed=0)
    quality = judge(data, None, 0.7)
    output, lse = sla2_attention(*calls[1], sparsity=0.7, impl="torch", return_lse=True, **BLOCKS)
    full = dense_attention(*calls[1])
    error = output - full
    squared = error.square().sum((1, 3)) / full.square().sum((1, 3))
    expected = {
        "error": squared.mean(),
        "rel_l1": error.abs().sum() / full.abs().sum(),
        "rel_l2": error.norm() / full.norm(),
        "recall": exact_recall(calls[1].query, calls[1].key, lse).mean(),
    }
    assert vars(quality) == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)


def misleading_call(seed: int, length: int = 320) -> Capture:
    """Calls on which block means mislead: keys of some blocks vary a lot, and so weigh a lot.

    Their means tell by coordinate 14, and queries are 1 in coordinate 15: a projection can join
    the two, the heuristic cannot, since no query has anything in 14 nor any key in 15.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, length, 2, 16, generator=generator) for _ in range(3))
    # Which blocks vary is another question in every call.
    varied = torch.randperm(length // BLOCK_K, generator=generator)[: length // BLOCK_K // 5]
    loud = torch.zeros(length // BLOCK_K).index_fill(0, varied, 1.0).repeat_interleave(BLOCK_K)
    scale = 1 + 2.5 * loud[None, :, None, None]
    key, query = key * scale, query * 1.5
    key[..., 14], key[..., 15] = 2 * loud[None, :, None], 0.0
    query[..., 14], query[..., 15] = 0.0, 2.0
    return Capture(query, key, value)


@pytest.fixture(scope="module")
def misled():
    calls = [misleading_call(seed) for seed in range(6)]
    options = FitOptions(**SHORT)
    return LayerData(calls, held_out=2, config=CONFIG, options=options, device=CPU, seed=0)


@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per-head"])
def test_a_router_learns_what_the_heuristic_misses(misled, per_head):
    fit = fit_layer(misled, 0.8, FitOptions(**SHORT), per_head=per_head)
    assert fit.chosen == "router+alpha"
    assert fit.after.recall > fit.before.recall + 0.1
    assert fit.after.error < 0.7 * fit.before.error
    assert fit.after == judge(misled, fit.router, 0.8)


@pytest.mark.parametrize("trainable", ["alpha", "router"])
def test_only_what_is_asked_for_is_trained(misled, trainable):
    fit = fit_layer(misled, 0.8, FitOptions(**SHORT, trainable=trainable))
    assert fit.chosen == trainable
    assert fit.after.error < fit.before.error
    eye = torch.eye(16)
    at_start = {
        "router": torch.equal(fit.router.query_proj, eye) and torch.equal(fit.router.key_proj, eye),
        "alpha": bool((fit.router.alpha_scale == 1).all() and (fit.router.alpha_bias == 0).all()),
    }
    assert at_start == {trainable: False, "alpha" if trainable == "router" else "router": True}


def test_a_fit_that_goes_astray_is_not_shipped(misled):
    wild = FitOptions(**{**SHORT, "steps": 10, "learning_rate": 1e4, "alpha_learning_rate": 1e4})
    fit = fit_layer(misled, 0.8, wild)
    assert fit.after.error <= fit.before.error


@pytest.mark.parametrize(("steps", "sparsity"), [(0, 0.8), (5, 0.0)])
def test_without_steps_or_without_sparsity_it_stays_training_free(misled, steps, sparsity):
    fit = fit_layer(misled, sparsity, FitOptions(**{**SHORT, "steps": steps}))
    assert (fit.chosen, fit.before) == ("training-free", fit.after)


def test_tables_that_do_not_fit_are_made_anew_and_change_nothing(misled):
    calls = [misleading_call(seed) for seed in range(6)]
    options = FitOptions(**{**SHORT, "steps": 10}, table_memory=1)
    data = LayerData(calls, held_out=2, config=CONFIG, options=options, device=CPU, seed=0)
    kept = LayerData(
        calls, held_out=2, config=CONFIG, options=FitOptions(**SHORT), device=CPU, seed=0
    )
    made = [next(iter(x.batches())) for x in (data, kept)]
    assert torch.equal(made[0].block_output, made[1].block_output)
    assert fit_layer(data, 0.8, options).before == judge(misled, None, 0.8)


def test_a_large_call_samples_fewer_rows(misled):
    # One row of each of 6 blocks: 2 heads x 16 numbers from each of 40 key blocks.
    row = 6 * 40 * 2 * 16 * 4
    for memory, rows in ((3 * row, 3), (1, 1)):
        options = FitOptions(**SHORT, call_memory=memory)
        call = misleading_call(0)
        data = LayerData([call], held_out=0, config=CONFIG, options=options, device=CPU, seed=0)
        table = next(iter(data.batches())).block_output
        assert table.shape == (1, 2, 6, rows, 40, 16) and table.nbytes == rows * row


def test_a_single_prompt_is_judged_by_other_blocks():
    call = misleading_call(0)
    options = FitOptions(blocks=8, rows=4)
    data = LayerData([call], held_out=0, config=CONFIG, options=options, device=CPU, seed=0)
    trained, judged = next(iter(data.batches())), next(data.held_out())
    assert sorted([*trained.blocks.tolist(), *judged.blocks.tolist()]) == list(range(20))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"steps": -1}, "`steps` must be at least 0, got -1"),
        ({"trainable": "all"}, "`trainable` must be one of"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a positive number"),
        ({"tau": float("nan")}, "`tau` must be a positive number"),
        ({"rows": 0}, "`rows` must be at least 1"),
        ({"hard_share": 1.5}, r"`hard_share` must be in \[0, 1\]"),
    ],
)
def test_bad_options(wrong, words):
    with pytest.raises(InputError, match=words):
        FitOptions(**wrong)
