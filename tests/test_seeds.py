from cropi.seeds import unit_interval, unit_intervals


def test_many_draws_are_those_of_one_by_one() -> None:
    names = ["a", "b/c", "", "ü"]
    for purpose in [(), ("explore", 2)]:
        assert list(unit_intervals(names, 7, *purpose)) == [unit_interval(7, *purpose, name) for name in names]
