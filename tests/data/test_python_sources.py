import pytest

from dataeff.data.python_sources import find_sources


def test_the_standard_library_and_torch_are_found():
    sources = find_sources()
    modules = {source.module: source for source in sources}
    assert [source.module for source in sources] == sorted(modules)
    assert modules["json"].is_package and not modules["json.decoder"].is_package
    assert "torch.nn.functional" in modules and "torch" in modules
    assert not any("test" in module.split(".") for module in modules)


def test_a_smaller_scale_is_a_subset():
    small = {s.module for s in find_sources(scale=0.1, seed=3)}
    large = {s.module for s in find_sources(scale=0.3, seed=3)}
    assert small < large and 0 < len(small) < len(large) / 2
    assert small != {s.module for s in find_sources(scale=0.1, seed=4)}


@pytest.mark.parametrize("scale", [0, -1.0, 1.5, float("nan")])
def test_a_wrong_scale_is_named(scale):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        find_sources(scale=scale)


def test_a_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        find_sources(packages=["no_such_package"])
