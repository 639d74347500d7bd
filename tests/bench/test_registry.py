import pytest

from dataeff import bench


@pytest.mark.parametrize("name", list(bench.workloads()))
def test_listing_a_workload_is_cheap_and_names_ours_and_a_peer(name):
    for quick in (True, False):
        listed = list(bench.cases(name, bench.Options(quick=quick)))
        assert listed
        assert len({case.size for case in listed}) == len(listed)
        for case in listed:
            roles = [provider.role for provider in case.providers]
            assert "ours" in roles and "peer" in roles
            names = [provider.name for provider in (*case.providers, *case.ceilings)]
            assert len(set(names)) == len(names)
            assert all(ceiling.role == "ceiling" for ceiling in case.ceilings)
