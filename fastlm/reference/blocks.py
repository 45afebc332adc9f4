"""The blocks in which scores and logits are computed, so that not all of them exist at once."""

# Scores or logits that exist at once: 32 MB per temporary in float64, so that the reference result
# for 2048 x 2048 scores or 32768 classes fits in memory along with what is tested.
SCORES = 1 << 22


def row_blocks(rows: int, classes: int) -> list[slice]:
    step = max(1, SCORES // max(1, classes))
    return [slice(i, i + step) for i in range(0, max(1, rows), step)]
