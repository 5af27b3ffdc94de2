"""Package metadata, constraints and tool configurations are consistent."""

import configparser
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def _setup():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def test_citation_and_package_have_the_same_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    metadata = _setup()["metadata"]
    assert citation["version"] == metadata["version"]
    assert citation["license"] == metadata["license"]
    assert citation["title"] == metadata["name"]


def test_pre_commit_uses_constrained_versions():
    constraints = (ROOT / "constraints.txt").read_text()
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    revisions = {repo["repo"].rsplit("/")[-1]: repo.get("rev") for repo in repos}
    for repo, package in {"ruff-pre-commit": "ruff", "codespell": "codespell"}.items():
        (version,) = re.findall(rf"^{package}==(\S+)$", constraints, re.MULTILINE)
        assert revisions[repo] == f"v{version}"


def test_direct_dependencies_are_constrained():
    setup = _setup()
    groups = [setup["options"]["install_requires"]]
    groups += [
        setup["options.extras_require"][name]
        for name in ("dev", "docs", "onnx", "beam", "mlflow", "wandb")
    ]
    lines = [line for group in groups for line in group.splitlines()]
    names = {_normal(re.match(r"[\w.-]+", line)[0]) for line in lines if line and line[0] != "#"}
    constraints = (ROOT / "constraints.txt").read_text()
    assert (
        names - {_normal(name) for name in re.findall(r"^([\w.-]+)==", constraints, re.M)} == set()
    )


def test_wheel_has_all_files_of_the_packages():
    patterns = {
        package: [pattern.strip() for pattern in names.split(",")]
        for package, names in _setup()["options.package_data"].items()
    }
    missing = [
        str(path.relative_to(ROOT))
        for top in ("transfer", "recipes", "pretrained")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "README.md"
        if not any(
            path.match(pattern)
            for pattern in patterns.get(".".join(path.parent.relative_to(ROOT).parts), [])
        )
    ]
    assert missing == []


def test_changelog_has_a_section_for_the_version():
    version = _setup()["metadata"]["version"]
    titles = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert any(re.fullmatch(rf"{version} - (unreleased|[\d-]{{10}})", title) for title in titles)


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()
