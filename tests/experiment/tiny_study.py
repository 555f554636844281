"""What small studies of the tests have in common."""

TINY = {
    "model": {"fresh": {"width": 16, "layers": 1, "heads": 2, "positions": 96, "vocab_size": 300}},
    "data": {
        "path": "synthetic",
        "template": "question",
        "test_fraction": 0.3,
        "max_length": 96,
        "synthetic": {"num_facts": 8, "num_rows": 60},
    },
    "seeds": [0, 1],
}
