import json

import pytest

import reelflow.recipes.compare as module


def test_the_plan_counts_steps_for_every_variant_and_runs_nothing(reelflow, tmp_path):
    status, out, _ = reelflow("compare", "--plan", "--set", "seeds=[0,1]")
    assert status == 0
    assert all(name in out for name in module.variants(module.comparison()))
    known = module.variants(module.comparison()).values()
    total = 2 * module.comparison().teraflops * sum(variant.budgets for variant in known)
    assert f"{2 * len(known)} runs, {total:g} teraflops" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("finished", "status"), [(True, 0), (False, 130)])
def test_options_reach_the_comparison(reelflow, monkeypatch, tmp_path, finished, status):
    called = []
    monkeypatch.setattr(module, "compare", lambda *a, **k: called.append((a, k)) or finished)
    assert reelflow("compare", "-o", "here", "--jobs", 2, "--set", 'only=["gated"]')[0] == status
    (config, out), options = called[0]
    assert (list(config.chosen), str(out), options["jobs"]) == (["gated"], "here", 2)
    assert options["command"] == "reelflow compare --set 'only=[\"gated\"]' --jobs 2"


def test_a_misspelt_value_is_refused_in_one_line(reelflow, tmp_path):
    status, _, err = reelflow("compare", "--set", 'only=["gate"]')
    assert (status, err.count("\n")) == (2, 1)
    assert "gated" in err
    assert json.dumps([str(p) for p in tmp_path.iterdir()]) == "[]"
