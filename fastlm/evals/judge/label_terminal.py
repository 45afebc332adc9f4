"""Run the loop of ``fastlm label``: print an answer, read the rater's label, store it."""

from fastlm.data.conversations import Message
from fastlm.errors import InputError
from fastlm.evals.judge.label_store import LabelItem, LabelStore
from fastlm.evals.judge.rubric import FAIL, PASS, TIE, A, B
from fastlm.evals.judge.scale import Grade, Scale
from fastlm.pipeline.rater_terminal import RaterTerminal
from fastlm.terminal import visible

INPUTS: dict[Scale, dict[str, Grade]] = {
    "pass": {"p": PASS, "pass": PASS, "f": FAIL, "fail": FAIL},
    "1-5": {str(grade): grade for grade in range(1, 6)},
    "1-10": {str(grade): grade for grade in range(1, 11)},
    "pair": {"1": A, "2": B, "=": TIE},
}
HELPS: dict[Scale, str] = {
    "pass": "p         the answer passes\nf         the answer fails",
    "1-5": "1 to 5    your grade of the answer by the rubric above; 5 is the best",
    "1-10": "1 to 10   your grade of the answer by the rubric above; 10 is the best",
    "pair": "1         answer 1 is better\n2         answer 2 is better\n"
    "=         they are equally good or equally bad",
}
QUESTIONS: dict[Scale, str] = {
    "pass": "p or f",
    "1-5": "1 to 5",
    "1-10": "1 to 10",
    "pair": "1, 2 or =",
}


def label_answers(store: LabelStore, rater: str) -> str:
    """Ask the rater for a label of each item of the store; return a line about what is done. Items
    with a label are not asked again.

    On a terminal an invalid input prints a line; otherwise it raises InputError.
    """
    store.progress(rater)  # checks the name before the first question
    session = _LabelTerminal(store, rater)
    session.console.print(visible(store.rubric.text), markup=False)
    session.run()
    counts, total = store.progress(rater)
    text = f", {counts.skipped:,} skipped" if counts.skipped else ""
    return f"{rater}: {counts.labelled:,} of {total:,} labelled{text}: {store.file.path}"


class _LabelTerminal(RaterTerminal[LabelItem]):
    def __init__(self, store: LabelStore, rater: str) -> None:
        super().__init__()
        self.store, self.rater = store, rater
        self.scale: Scale = store.rubric.scale
        self.question = f"{QUESTIONS[self.scale]}, ? for help: "
        self.help = HELPS[self.scale]

    def next_item(self) -> LabelItem | None:
        return self.store.next_item(self.rater)

    def item(self, key: str) -> LabelItem:
        return self.store.item(key, self.rater)

    def key(self, item: LabelItem) -> str:
        return item.id

    def title(self) -> str:
        counts, total = self.store.progress(self.rater)
        return f"{counts.labelled + counts.skipped + 1:,} of {total:,}"

    def messages(self, item: LabelItem) -> tuple[list[Message], tuple[list[Message], ...]]:
        return item.prompt, item.answers

    def skip(self, item: LabelItem) -> None:
        self.store.skip(self.rater, item)

    def enter(self, line: str, item: LabelItem) -> bool:
        inputs = INPUTS[self.scale]
        if line not in inputs:
            raise InputError(
                f"expected {QUESTIONS[self.scale]} (? shows the commands), got {line!r:.60}"
            )
        self.store.label(self.rater, item, inputs[line])
        return True
