"""The rules of a config: which value a parameter gets when several rules match it."""

from __future__ import annotations

import pytest

from hf_merge import ConfigError, LinearConfig, Merger, TiesConfig

from .zoo import ZOO


EXPERTS = ("a", "b", "c")


def weights(*rules: dict, default=1.0, name: str = "layer.weight", depth: float = 0.5) -> list[float]:
    return LinearConfig(weights=default, rules=list(rules)).resolve(name, depth, EXPERTS).weights


def test_the_first_rule_that_matches_wins():
    rules = [
        {"match": "bias", "weights": 5.0},
        {"match": "weight", "weights": 2.0},
        {"match": "layer", "weights": 3.0},
    ]
    assert weights(*rules) == [2.0, 2.0, 2.0]


def test_a_rule_may_name_some_experts_and_leave_the_others_to_the_next():
    rules = [
        {"match": "layer", "weights": {"a": 5.0}},
        {"match": "weight", "weights": {"a": 6.0, "b": 7.0}},
    ]
    assert weights(*rules) == [5.0, 7.0, 1.0]
    assert weights(*rules, default=[1.0, 2.0, 3.0]) == [5.0, 7.0, 3.0]
    assert weights(*rules, {"match": "layer", "weights": 9.0}) == [5.0, 7.0, 9.0]
    assert weights(*rules, {"match": "layer", "weights": {"c": 4.0}}) == [5.0, 7.0, 4.0]


def test_an_expert_in_a_rule_may_have_a_gradient():
    assert weights({"match": "layer", "weights": {"b": {"gradient": [0.0, 2.0]}}}, depth=0.25) == [1.0, 0.5, 1.0]


def test_a_rule_that_names_an_unknown_expert_is_refused():
    with pytest.raises(ConfigError, match="names the expert 'z'"):
        weights({"match": "layer", "weights": {"z": 1.0}})


def test_the_config_itself_names_every_expert():
    with pytest.raises(ConfigError, match="gives no value for the expert\\(s\\) b, c"):
        weights(default={"a": 1.0})


def test_a_setting_that_all_experts_share_takes_no_dictionary():
    with pytest.raises(ConfigError, match="the same for every expert"):
        TiesConfig(rules=[{"match": "layer", "scaling": {"a": 1.0}}])


NAMES = ("a.weight", "a.bias", "b.weight")


@pytest.mark.parametrize(
    ("rules", "overruled"),
    [
        ([{"match": "weight", "weights": 1.0}, {"match": "a", "weights": 2.0}], []),
        ([{"match": "a", "weights": 1.0}, {"match": "a.bias", "weights": 2.0}], ["a.bias"]),
        (
            [{"match": "weight", "weights": 1.0}, {"match": "bias", "weights": 2.0}, {"match": "a", "weights": 3.0}],
            ["a"],
        ),
        ([{"match": "a", "weights": {"x": 1.0}}, {"match": "a", "weights": 2.0}], []),
        ([{"match": "a", "weights": {"gradient": [0.0, 1.0]}}, {"match": "a", "weights": 2.0}], ["a"]),
        ([{"match": "a", "merge_type": "ties"}, {"match": "a", "weights": 2.0}], []),
        ([{"match": "none", "weights": 1.0}], []),
    ],
)
def test_rules_that_never_win_are_known(rules, overruled):
    assert LinearConfig(rules=rules).overruled(NAMES) == overruled


def test_plan_notes_a_rule_that_never_wins():
    model = ZOO["vit"].build()
    rules = [{"match": "weight", "weights": 2.0}, {"match": "attention.*weight", "weights": 3.0}]
    plan = Merger.from_pretrained({"a": model, "b": model}, LinearConfig(rules=rules)).check()
    assert [note for note in plan.notes if "'attention.*weight' has no effect" in note]
