from reelflow.families.published import FAMILIES


def test_every_size_is_listed_with_its_name_in_one_piece(reelflow):
    status, out, _ = reelflow("families")
    assert status == 0
    for family in FAMILIES:
        for name, size in family.sizes.items():
            assert f"{family.name}.{name} " in out
            assert f"{size.parameters:,}" in out


def test_a_listed_name_has_a_plan(reelflow):
    status, out, _ = reelflow("plan", "wan.t2v_1_3b", "--frames", 81)
    assert status == 0
    assert "32,760 + 512" in out
    assert reelflow("plan", "wan.t2v_1_3")[0] == 2
