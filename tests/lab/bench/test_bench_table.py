from cropi.lab.bench.table import aligned


def test_a_table_is_aligned_markdown() -> None:
    table = aligned(["name", "tok/s"], [["floor", "1"], ["a", "1,234.5"]])
    assert table.splitlines() == [
        "| name  |   tok/s |",
        "|-------|--------:|",
        "| floor |       1 |",
        "| a     | 1,234.5 |",
    ]
