"""What is built, installed and imported: wheels, sdists, editable installs, the links in them."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("kernels", "pipelines", "calibration")
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".*_cache", ".hypothesis", ".venv", "__pycache__", "*.egg-info", "build", "dist"
)


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """The standard output of a command that has to succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, links kept, with a stray cache file in it."""
    copy = tmp_path_factory.mktemp("checkout") / "repository"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_COPIED)
    cache = copy / "kernels" / "__pycache__"
    cache.mkdir()
    (cache / "stray.cpython-310.pyc").write_bytes(b"")
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, the wheel built from it, and the wheel built from the checkout."""
    out = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir")
    run(*build, out / "both", checkout)
    run(*build, out / "direct", "--wheel", checkout)
    return {
        "sdist": next((out / "both").glob("*.tar.gz")),
        "wheel from sdist": next((out / "both").glob("*.whl")),
        "wheel": next((out / "direct").glob("*.whl")),
    }


def names_in(wheel: Path) -> list[str]:
    return sorted(zipfile.ZipFile(wheel).namelist())


def package_files(checkout: Path) -> list[str]:
    """What a wheel has to hold: all Python files of the parts, the face, and its assets."""
    files = [p for part in PARTS for p in (checkout / part).rglob("*.py")]
    files += (checkout / "sla_video").glob("*.py")
    files += [p for p in (checkout / "sla_video" / "assets").rglob("*") if p.is_file()]
    files.append(checkout / "sla_video" / "py.typed")
    relative = [p.relative_to(checkout) for p in files]
    return sorted(str(p if p.parts[0] == "sla_video" else "sla_video" / p) for p in relative)


def test_wheel_holds_every_file_and_nothing_else(built: dict[str, Path], checkout: Path) -> None:
    names = [name for name in names_in(built["wheel"]) if ".dist-info/" not in name]
    assert names == package_files(checkout)
    assert "sla_video/kernels/router.py" in names


def test_wheel_holds_files_not_links(built: dict[str, Path], checkout: Path) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        for entry in wheel.infolist():
            assert not stat.S_ISLNK(entry.external_attr >> 16), entry.filename
        stored = wheel.read("sla_video/kernels/router.py")
    assert stored == (checkout / "kernels" / "router.py").read_bytes()


def test_sdist_holds_files_not_links(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        members = sdist.getmembers()
    assert [m.name for m in members if not (m.isfile() or m.isdir())] == []
    assert any(m.name.endswith("/sla_video/kernels/router.py") for m in members)


def test_sdist_gives_the_same_wheel(built: dict[str, Path]) -> None:
    assert names_in(built["wheel from sdist"]) == names_in(built["wheel"])


def test_metadata(built: dict[str, Path]) -> None:
    import sla_video

    with zipfile.ZipFile(built["wheel"]) as wheel:
        folder = next(n for n in wheel.namelist() if n.endswith("METADATA")).rpartition("/")[0]
        metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
        entry_points = wheel.read(f"{folder}/entry_points.txt").decode()
    assert metadata["Version"] == sla_video.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == {"test", "train", "bench", "report"}
    assert "sla-video = sla_video.cli:main" in entry_points


def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.EnvBuilder(symlinks=os.name != "nt").create(environment)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # The dependencies of this environment, without the editable installs that it may hold.
    import torch

    (site / "dependencies.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", checkout, cwd=tmp_path)

    code = "from sla_video.kernels import router; import sla_video; print(router.__file__)"
    where = run(python, "-c", code, cwd=tmp_path).strip()
    assert Path(where).resolve() == (checkout / "kernels" / "router.py").resolve()
    import sla_video

    script = environment / "bin" / "sla-video"
    assert run(script, "--version", cwd=tmp_path).strip() == sla_video.__version__


def test_another_package_named_kernels_wins_from_the_root(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("get_kernel = 'of the other package'\n")
    code = "import sla_video.cli; from kernels import get_kernel; print(get_kernel)"
    assert run(sys.executable, "-c", code, PYTHONPATH=str(tmp_path)).strip() == (
        "of the other package"
    )


def test_diffusers_and_transformers_import_from_the_root() -> None:
    code = (
        "from diffusers import WanPipeline; import transformers.integrations.hub_kernels;"
        "from diffusers.models.attention_dispatch import dispatch_attention_fn;"
        "import sla_video.kernels.router; print('imported')"
    )
    assert run(sys.executable, "-c", code).strip() == "imported"


KERNEL = """
import triton
import triton.language as tl


@triton.jit
def add_one_kernel(x_ptr, length, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < length
    tl.store(x_ptr + offsets, tl.load(x_ptr + offsets, mask=mask) + 1, mask=mask)
"""


@pytest.mark.parametrize("interpret", ["0", "1"], ids=["compiled", "interpreted"])
def test_triton_reads_kernels_through_a_link(tmp_path: Path, interpret: str) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "add_one.py").write_text(KERNEL)
    (tmp_path / "face").mkdir()
    (tmp_path / "face" / "__init__.py").write_text("")
    (tmp_path / "face" / "kernels").symlink_to(Path("..") / "kernels")
    code = "from face.kernels.add_one import add_one_kernel as kernel; "
    if interpret == "1":
        code += "import torch; x = torch.zeros(5); kernel[(1,)](x, 3, BLOCK=4); print(x.tolist())"
        expected = "[1.0, 1.0, 1.0, 0.0, 0.0]"
    else:
        code += "print(kernel.src.splitlines()[0])"
        expected = "def add_one_kernel(x_ptr, length, BLOCK: tl.constexpr):"
    assert run(sys.executable, "-c", code, cwd=tmp_path, TRITON_INTERPRET=interpret).strip() == (
        expected
    )


def test_torch_compile_traces_through_the_link() -> None:
    import inspect

    import torch

    from sla_video.kernels.routing import block_means

    assert inspect.getsource(block_means).startswith("def block_means")
    x = torch.randn(1, 11, 2, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(block_means, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, 4), block_means(x, 4))


def test_mypy_sees_the_package_through_the_link(tmp_path: Path) -> None:
    config = tmp_path / "mypy.ini"
    config.write_text(
        f"[mypy]\nmypy_path = {ROOT}\nexplicit_package_bases = true\nfollow_imports = silent\n"
        "[mypy-torch.*]\nfollow_imports = skip\n"
        "[mypy-diffusers.*,transformers.*]\nfollow_imports = skip\n"
    )
    file = tmp_path / "caller.py"
    file.write_text("from sla_video.pipelines.errors import one_line\nx: int = one_line('text')\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--config-file", config, file],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert len(done.stdout.splitlines()) == 1, done.stdout
    assert 'expression has type "str", variable has type "int"' in done.stdout


def test_import_is_light() -> None:
    code = (
        "import sys, sla_video; from sla_video import __version__; dir(sla_video);"
        "print(sorted({'torch', 'diffusers', 'transformers', 'triton', 'numpy', 'rich', 'typer'}"
        " & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", code).strip() == "[]"


def test_every_public_name_resolves() -> None:
    import sla_video

    for name in sla_video.__all__:
        assert getattr(sla_video, name) is not None
        assert name in dir(sla_video)
    with pytest.raises(AttributeError, match="has no attribute 'enable_slaa'"):
        sla_video.enable_slaa  # noqa: B018
