"""The blocks in which scores and logits are computed, so that not all exist at a time."""

# Scores or logits that exist at a time: 32 MB of each temporary in float64, so that the truth of
# 2048 x 2048 scores or of 32768 classes fits beside what is tested.
SCORES = 1 << 22


def row_blocks(rows: int, classes: int) -> list[slice]:
    step = max(1, SCORES // max(1, classes))
    return [slice(i, i + step) for i in range(0, max(1, rows), step)]
