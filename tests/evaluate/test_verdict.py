import pytest

from b2t.evaluate.metrics import count_edits
from b2t.evaluate.prior import text_prior
from b2t.evaluate.results import Evaluation
from b2t.evaluate.verdict import control_rates, unbeaten, verdict


def result(**fields):
    made = Evaluation(split="test", wer=0.3, wer_interval=(0.25, 0.35), **fields)
    return made


def test_a_score_below_every_control_says_nothing():
    sound = result(wer_noise=0.9, wer_shuffled=1.0, controls={"codes": {"wer": 0.8, "per": 0.1}})
    sound.details["wer"] = {"p_permutation": 0.001}
    assert unbeaten(sound, "wer") == [] and verdict(sound) is None
    assert control_rates(sound, "wer") == {"noise": 0.9, "codes": 0.8, "shuffled": 1.0}
    assert verdict(Evaluation(split="test")) is None


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"wer_noise": 0.34}, "noise"),
        ({"wer_shuffled": 0.30}, "another trial's signal"),
        ({"controls": {"spectrum": {"wer": 0.31}}}, "noise of equal spectrum"),
        ({"controls": {"codes": {"wer": 0.2}}}, "codes in another order"),
        ({"prior": {"wer_constant": 0.35}}, "one sentence for every trial"),
        ({"details": {"wer": {"p_permutation": 0.3}}}, "other trials (p = 0.3)"),
    ],
)
def test_one_control_that_is_as_good_is_enough(fields, told):
    made = result(wer_lm=0.1, wer_lm_interval=(0.05, 0.15), wer_lm_noise=0.9, **fields)
    assert unbeaten(made, "wer") == [told]
    assert verdict(made) == f"NOT DECODING: words no better than {told}"
    assert unbeaten(made, "wer_lm") == []


def test_the_prior_is_what_training_texts_suggest():
    """Against every training sentence as the answer to all the others."""
    training = ["I am cold.", "I am fine.", "I am cold.", "You call me now.", "I am here now."]
    found = text_prior(training, ["I am cold", "you are"])
    assert found["most_frequent"] == "i am cold"
    assert found["wer_most_frequent"] == pytest.approx(3 / 5)
    plain = ["i am cold", "i am fine", "i am cold", "you call me now", "i am here now"]
    cost = {t: count_edits(plain, [t] * 5, "word").edits.sum() for t in plain}
    assert cost[found["constant"]] == min(cost.values())
    assert 0.4 < found["wer_random"] < 1.5
    assert text_prior([], ["a"]) == {} == text_prior(["a"], ["?!"])
