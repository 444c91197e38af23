"""Eight logical ranks agree with one, and what a rank receives does not grow with their number."""

from tests.script_modules import script


def test_eight_ranks_hold_what_one_does_and_receive_no_more_than_four(repository):
    with script(repository, "simulate_ranks") as simulate:
        alone, four, eight = (simulate.on_ranks(world) for world in (1, 4, 8))
        found = [simulate.compare(len(ranks), ranks, alone[0]) for ranks in (four, eight)]
    for one in found:
        assert one["same"] and one["shared"]
        assert one["off"] < 1e-4
    assert found[1]["update"] == found[0]["update"]
    # Hashes alone come from every rank: 8 bytes a frame offered.
    assert found[1]["revival"] < 1.5 * found[0]["revival"]


def test_a_rank_that_differs_is_seen(repository):
    with script(repository, "simulate_ranks") as simulate:
        alone = simulate.on_ranks(1)
        ranks = simulate.on_ranks(2)
        ranks[1]["checksum"] += 1
        ranks[0]["trials"][0].pop()
        one = simulate.compare(2, ranks, alone[0])
    assert not one["same"] and not one["shared"]
