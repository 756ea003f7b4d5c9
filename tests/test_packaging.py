"""The package as it is built: what is mapped, what is packed, and what an import costs."""

from __future__ import annotations

import configparser
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAZY = ("captum", "lightning", "matplotlib", "mlflow", "pytorch_lightning", "tensorboard")
LAZY += ("tokenizers", "transformers", "wandb", "xarray")


@pytest.fixture(scope="module")
def options() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def listed(options: configparser.ConfigParser) -> set[str]:
    return set(options["options"]["packages"].split())


def in_tree() -> set[str]:
    """Every package below lightning_mi, found through the link as a type checker finds it."""
    inits = [*(ROOT / "lightning_mi").glob("**/__init__.py")]
    inits += [*(ROOT / "lightning_mi").glob("callbacks/__init__.py")]  # `**` may pass links by
    found = {path.parent.relative_to(ROOT) for path in inits}
    return {".".join(path.parts) for path in found}


def python(code: str, *, path: Path, cwd: Path, options: Sequence[str] = ()) -> str:
    """Run code in a fresh process that finds the package below `path` first."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *options, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_package_list_is_the_tree(options: configparser.ConfigParser) -> None:
    assert listed(options) == in_tree()


def test_no_module_hides_in_an_unlisted_folder(options: configparser.ConfigParser) -> None:
    folders = {path.parent for path in (ROOT / "lightning_mi").glob("**/*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert packages <= listed(options)


def test_mapping_and_link_lead_to_the_same_folder(options: configparser.ConfigParser) -> None:
    assert options["options"]["package_dir"].split("=")[0].strip() == "lightning_mi.callbacks"
    assert options["options"]["package_dir"].split("=")[1].strip() == "callbacks"
    link = ROOT / "lightning_mi" / "callbacks"
    if not link.is_symlink():
        pytest.skip("this checkout has no symbolic links; the mapping alone is used")
    assert os.readlink(link) == "../callbacks"
    assert link.resolve() == ROOT / "callbacks"


def test_callbacks_import_the_engine_relatively() -> None:
    """So that a stray `import callbacks` fails loudly instead of making a second copy."""
    for file in (ROOT / "callbacks").glob("*.py"):
        lines = [line.strip() for line in file.read_text().splitlines()]
        absolute = ("from lightning_mi", "import lightning_mi")
        stray = [line for line in lines if line.startswith(absolute)]
        assert not stray, f"{file.name}: {stray}"


def test_callbacks_alone_are_no_package() -> None:
    code = "try:\n    import callbacks\nexcept ImportError:\n    print('refused')"
    assert python(code, path=ROOT, cwd=ROOT) == "refused"


def test_an_uninstalled_checkout_imports(tmp_path: Path) -> None:
    code = "import lightning_mi, lightning_mi.callbacks as c; print(c.__name__)"
    assert python(code, path=ROOT, cwd=tmp_path) == "lightning_mi.callbacks"


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    code = f"import sys, lightning_mi; print([m for m in {LAZY} if m in sys.modules])"
    assert python(code, path=ROOT, cwd=tmp_path) == "[]"


def test_no_part_of_the_engine_loads_anything_heavy(tmp_path: Path) -> None:
    packages = ("attention", "attribution", "behaviors", "circuits", "influence")
    code = "import sys, " + ", ".join(f"lightning_mi.{name}" for name in packages)
    code += f"; print([m for m in {LAZY} if m in sys.modules])"
    assert python(code, path=ROOT, cwd=tmp_path) == "[]"


def test_pinned_versions_meet_the_bounds(options: configparser.ConfigParser) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    pins = {canonicalize_name(name): version for name, version in pairs}
    wanted = options["options"]["install_requires"].splitlines()
    for extra in options["options.extras_require"].values():
        wanted += extra.splitlines()
    for requirement in map(Requirement, filter(None, wanted)):
        name = canonicalize_name(requirement.name)
        if name in pins:
            assert requirement.specifier.contains(pins[name], prereleases=True), requirement


def test_every_dependency_has_a_lower_bound_and_a_pin(options: configparser.ConfigParser) -> None:
    from packaging.requirements import Requirement

    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    for line in filter(None, options["options"]["install_requires"].splitlines()):
        requirement = Requirement(line)
        operators = {clause.operator for clause in requirement.specifier}
        assert ">=" in operators, line
        assert f"\n{requirement.name.lower()}==" in pins, line
        assert operators == {">="} or requirement.name == "jsonargparse", line


def build(kind: str, tmp_path: Path, source: Path) -> Path:
    """Build from a copy, so that nothing is left in the tree, and with what is installed alone."""
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation"]
    done = subprocess.run(
        [*command, "--outdir", str(tmp_path / "dist"), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tmp_path / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return archive


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the files that are tracked, without the link: mapping alone must do."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    target = tmp_path / "source"
    for name in listing.stdout.splitlines():
        file = ROOT / name
        if file.is_file() and not file.is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(file.read_bytes())
    return target


def check_imports(folder: Path, cwd: Path, options: configparser.ConfigParser) -> None:
    code = f"import importlib; [importlib.import_module(p) for p in {sorted(listed(options))}]"
    code += "; import lightning_mi.__main__ as m; print(m.__file__)"
    assert python(code, path=folder, cwd=cwd).startswith(str(folder))
    assert (folder / "lightning_mi" / "py.typed").exists()


@pytest.mark.slow
def test_wheel(tmp_path: Path, source: Path, options: configparser.ConfigParser) -> None:
    with zipfile.ZipFile(build("wheel", tmp_path, source)) as wheel:
        names = wheel.namelist()
        wheel.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lightning_mi"}
    assets = {p.name for p in (ROOT / "lightning_mi" / "report").rglob("*") if p.is_file()}
    packed = {Path(name).name for name in names if name.startswith("lightning_mi/report/")}
    assert {a for a in assets if a.endswith((".js", ".css", ".html", ".py"))} <= packed
    check_imports(tmp_path / "site", tmp_path, options)


@pytest.mark.slow
def test_sdist_builds_a_wheel(
    tmp_path: Path, source: Path, options: configparser.ConfigParser
) -> None:
    with tarfile.open(build("sdist", tmp_path, source)) as archive:
        archive.extractall(tmp_path, filter="data")
        names = archive.getnames()
    assert len(names) == len(set(names))
    (unpacked,) = tmp_path.glob("lightning_mi-*")
    assert (unpacked / "callbacks" / "__init__.py").exists()
    with zipfile.ZipFile(build("wheel", tmp_path / "again", unpacked)) as wheel:
        wheel.extractall(tmp_path / "site")
    check_imports(tmp_path / "site", tmp_path, options)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="one interpreter is enough")
def test_editable_install(tmp_path: Path, source: Path) -> None:
    """In an environment of its own that sees the installed dependencies, and touches none."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(site), "--editable", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Without the site module nothing but the new install can lead to the package.
    folders = [str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    code = f"import site, sys; sys.path += {folders}; site.addsitedir({str(site)!r})"
    code += "; import lightning_mi.callbacks as c; print(c.__file__)"
    where = python(code, path=tmp_path, cwd=tmp_path, options=["-S"])
    assert where == str(source / "callbacks" / "__init__.py")


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_what_the_docs_import_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = re.findall(r"^from (lightning_mi[\w.]*) import \(?([^()#]*?)\)?$", text, re.MULTILINE)
    missing = [
        f"{module}.{name.split(' as ')[0]}"
        for module, names in lines
        for name in re.split(r",\s*", names.strip().rstrip(","))
        if not hasattr(importlib.import_module(module), name.split(" as ")[0])
    ]
    assert not missing
