from b2t.counted import counted


def test_one_is_no_plural():
    found = [counted(number, "trial") for number in (0, 1, 2, 1200)]
    assert found == ["0 trials", "1 trial", "2 trials", "1,200 trials"]
