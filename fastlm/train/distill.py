"""Distillation: a student learns the distributions of a teacher over answers' tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.errors import InputError
from fastlm.pipeline.stage import (
    Facts,
    InputSpec,
    StageContext,
    at_least_one,
    not_negative,
    one_of,
    positive,
    select_options,
)
from fastlm.sources.input_digest import InputDigest
from fastlm.torchrun import check_single_process
from fastlm.train.encoding import chat_tokenizer, check_vocabulary, template_variables
from fastlm.train.objective import IGNORE, weights_digest
from fastlm.train.options import check_unsharded, expect
from fastlm.train.sft import ConversationDataset, Sft, SftObjective

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fastlm.data.conversations import RowCounts
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.objective import Example, PackedBatch
    from fastlm.train.options import TrainOptions
    from fastlm.train.teacher import TeacherLogits

DIVERGENCES = {
    "forward": "forward KL", "reverse": "reverse KL", "jsd": "Jensen-Shannon divergence",
}  # fmt: skip
LOGITS, COMPLETIONS = "teacher-logits", "teacher-completions"
# The options that a loss of the teacher's answers alone has no use for
DIVERGENCE_OPTIONS = (
    "divergence", "jsd_beta", "sft_weight", "on_policy_fraction", "teacher_top_k", "teacher_logits",
    "data_weights",
)  # fmt: skip


@dataclass(frozen=True)
class DistillOptions:
    """The loss of distillation, and the student's own samples."""

    divergence: Annotated[
        str, "forward KL(teacher, student), reverse KL(student, teacher), or jsd, between them"
    ] = "forward"
    jsd_beta: Annotated[float, "Share of the teacher in the mixture of jsd, 0 to 1"] = 0.5
    temperature: Annotated[float, "Divides the logits of both"] = 1.0
    sft_weight: Annotated[float, "Coefficient of the cross-entropy of the answers' tokens"] = 0.0
    on_policy_fraction: Annotated[
        float, "Share of micro-batches with answers that the student samples"
    ] = 0.0
    max_new_tokens: Annotated[int, "Most tokens of an answer of the student or teacher"] = 128


class DistillObjective(SftObjective):
    """The objective of `Distill`: a divergence of student and teacher at the learnt tokens, a mean
    over those of the whole step, plus `sft_weight` times the cross-entropy.
    """

    def __init__(self, *args: Any, rules: DistillOptions, **common: Any):
        self.rules = rules
        super().__init__(*args, **common)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **asdict(self.rules)}

    def divergence(self, student: "Tensor", head: "Tensor", batch: Any, num_items: int) -> "Tensor":
        """The sum over learnt tokens, divided by ``num_items``; ``student``: its hidden states."""
        raise NotImplementedError

    def loss(self, batch: Any, num_items: int) -> "Tensor":
        import torch

        from fastlm.ops import linear_cross_entropy

        ids, labels, cu_seqlens = batch[:3]
        model: Any = self.trained
        student = model.hidden(ids, cu_seqlens=cu_seqlens)[0]
        head = model.head_matrix(student.dtype)
        loss = self.divergence(student, head, batch, num_items)
        if self.rules.sft_weight:
            entropy = linear_cross_entropy(
                student, head, labels[0], softcap=model.config.final_logit_softcapping,
                ignore_index=IGNORE, num_items=num_items,
            )  # fmt: skip
            assert isinstance(entropy, torch.Tensor)  # a pair only with return_lse
            loss = loss + self.rules.sft_weight * entropy
        return loss


class TeacherModelObjective(DistillObjective):
    """A teacher in memory (`fastlm.ops.linear_distillation`).

    With a probability of `on_policy_fraction` a micro-batch has answers that the student samples to
    the first question of each conversation, in place of its own (Agarwal et al. 2024,
    arXiv:2306.13649).
    """

    def __init__(self, *args: Any, teacher: "CausalLM", **common: Any):
        self.teacher = teacher.requires_grad_(False).eval()
        super().__init__(*args, **common)
        self.own = self.all = 0  # micro-batches of the step, those of them with samples

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "teacher": weights_digest(self.teacher)}

    def next_batches(self, count: int) -> "list[PackedBatch]":
        """Return ``count`` micro-batches, or what the epoch has left."""
        import numpy as np

        taken = self.next_rows(count)
        examples = [[self.examples[i] for i in rows] for rows in taken]
        batches: dict[int, PackedBatch] = {}
        drawn = []  # which micro-batches are sampled, and by what
        for place, rows in enumerate(taken):
            rng = np.random.Generator(np.random.PCG64([self.seed, 1, self.epoch, rows[0]]))
            if rng.random() < self.rules.on_policy_fraction:
                drawn.append((place, rng))
            else:
                batches[place] = self.collate(examples[place])
        self.own, self.all = len(drawn), len(taken)
        mine, _ = self.world.split_batches(drawn)
        if drawn:  # each process samples its share
            for part in self.world.gather_results(
                lambda: {place: self._sampled(examples[place], rng) for place, rng in mine}
            ):
                for place, (ids, labels, ends) in part.items():
                    on = self.device
                    batches[place] = ids.to(on), labels.to(on), ends.to(on)
        return [batches[place] for place in range(len(taken))]

    def _sampled(self, examples: "list[Example]", rng: "np.random.Generator") -> "PackedBatch":
        """A micro-batch with the student's answers, on the CPU."""
        import torch

        from fastlm.train.rollouts import pack_rollouts, sample_completions

        prompts = [e.ids[: int(e.loss_mask.argmax())].tolist() for e in examples]
        model: Any = self.trained
        model.eval()
        room = model.context_limit - max(map(len, prompts))
        answers = sample_completions(
            model, prompts, max_new_tokens=min(self.rules.max_new_tokens, room),
            seed=int(rng.integers(2**62)), max_num_seqs=len(prompts),
        )  # fmt: skip
        model.train()
        answered = [answer.token_ids for answer in answers]
        cpu = torch.device("cpu")  # without keys, which a batch of distillation has not
        packed = pack_rollouts(prompts, answered, cpu, share_prompts=False)
        return packed.ids, packed.labels, packed.cu_seqlens

    def divergence(self, student: "Tensor", head: "Tensor", batch: Any, num_items: int) -> "Tensor":
        import torch

        from fastlm.ops import linear_distillation

        ids, labels, cu_seqlens = batch
        model: Any = self.trained
        with torch.no_grad():
            teacher = self.teacher.hidden(ids, cu_seqlens=cu_seqlens)[0]
            teacher_head = self.teacher.head_matrix(teacher.dtype)
        rules = self.rules
        return linear_distillation(
            student, head, teacher, teacher_head, kind=rules.divergence, beta=rules.jsd_beta,
            temperature=rules.temperature, mask=labels[0] != IGNORE, num_items=num_items,
            student_softcap=model.config.final_logit_softcapping,
            teacher_softcap=self.teacher.config.final_logit_softcapping,
        )  # fmt: skip

    def scalars(self, measurements: Sequence[Any]) -> dict[str, float]:
        return {**super().scalars(measurements), "on_policy_fraction": self.own / max(self.all, 1)}


class TeacherLogitsObjective(DistillObjective):
    """A teacher on disk (`fastlm.train.teacher`): the forward KL to its likeliest tokens and
    the rest. Batches have the teacher's rows after the usual three tensors.
    """

    def __init__(self, *args: Any, stored: "TeacherLogits", **common: Any):
        self.stored = stored
        super().__init__(*args, **common)
        self.stored_rows = stored.identity([*self.examples, *self.heldout])

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "teacher_logits": self.stored_rows}

    def collate(self, examples: "Sequence[Example]") -> Any:
        import torch

        ids, logprobs = (torch.from_numpy(x).to(self.device) for x in self.stored.rows(examples))
        return (*super().collate(examples), ids, logprobs[:, :-1], logprobs[:, -1])

    def divergence(self, student: "Tensor", head: "Tensor", batch: Any, num_items: int) -> "Tensor":
        from fastlm.train.teacher import logprobs_at, topk_forward_kl

        _, labels, _, ids, teacher, rest = batch
        model: Any = self.trained
        own = logprobs_at(
            student[labels[0] != IGNORE], head, ids, temperature=self.rules.temperature,
            softcap=model.config.final_logit_softcapping,
        )  # fmt: skip
        return topk_forward_kl(own, teacher, rest).sum() / num_items


@dataclass(frozen=True)
class Distill(DistillOptions, Sft):
    """Teach a student what a larger model would say: at every token of the answers it learns the
    teacher's distribution, not the answer's token alone.

    Both must have the same vocabulary. The same command run again resumes from the last checkpoint.
    """

    kind = "distill"
    command = ("distill",)
    inputs = {
        "model": InputSpec(("model",), "Student to train: a run, a Hugging Face folder"),
        "teacher": InputSpec(("model",), "Model to learn from", default=False, optional=True),
    }
    checkpoints = ("checkpoints", LOGITS, COMPLETIONS, f"{COMPLETIONS}.json")

    teacher_completions: Annotated[
        str, "Learn answers that the teacher gives first, greedy or sampled, and nothing else"
    ] = ""
    teacher_top_k: Annotated[
        int | None, "Ask the teacher once, and store its k likeliest tokens: no teacher in training"
    ] = None
    teacher_logits: Annotated[
        str, "Folder of such tokens, as a run with teacher_top_k left: no teacher at all"
    ] = ""

    def check(self) -> None:
        super().check()
        self.check_data(feedback=False)
        at_least_one(self, "max_new_tokens")
        one_of(self, divergence=DIVERGENCES)
        if self.teacher_top_k is not None:
            at_least_one(self, "teacher_top_k")
            expect(not self.teacher_logits, "teacher_top_k", "none beside teacher_logits", "both")
        if self.teacher_top_k or self.teacher_logits:
            name = "teacher_top_k" if self.teacher_top_k else "teacher_logits"
            lacks = f"with {name}, which lacks"
            only = f"forward {lacks} the probabilities of the other tokens"
            expect(self.divergence == "forward", "divergence", only, self.divergence)
            none = f"0 {lacks} answers that are sampled later"
            expect(not self.on_policy_fraction, "on_policy_fraction", none, self.on_policy_fraction)
        expect(0 < self.jsd_beta < 1, "jsd_beta", "a number between 0 and 1", self.jsd_beta)
        positive(self, "temperature")
        not_negative(self, "sft_weight")
        for name in ("teacher_top_k", "teacher_completions"):
            if getattr(self, name):
                check_single_process(name, "answers and logits are made by one")
        if self.on_policy_fraction:
            check_unsharded("on_policy_fraction", self.parallel)
        expect(
            0 <= self.on_policy_fraction <= 1,
            "on_policy_fraction",
            "0 to 1",
            self.on_policy_fraction,
        )
        if self.teacher_completions:
            how = self.teacher_completions
            one_of(self, teacher_completions=("greedy", "sampled"))
            for name in (*DIVERGENCE_OPTIONS, *(("temperature",) if how == "greedy" else ())):
                value, default = getattr(self, name), getattr(type(self), name)
                unused = (
                    f"{default or 'none'} with teacher_completions {how}, which does not use it"
                )
                expect(value == default, name, unused, value)

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        self.check_teacher(bool(inputs["teacher"]))
        return super().plan(inputs)

    def check_teacher(self, given: bool) -> None:
        one = bool(self.teacher_logits) != given
        expect(one, "teacher", "a teacher or teacher_logits", "both" if given else "neither")

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        stored = input_digest.hash_tree(self.teacher_logits) if self.teacher_logits else None
        return [super().digest_inputs(input_digest), stored]

    def read_data(
        self, tokenizer: "Tokenizer", context: int, ctx: StageContext
    ) -> ConversationDataset:
        self.check_teacher(bool(ctx.inputs.get("teacher")))
        if not self.teacher_completions:
            return super().read_data(tokenizer, context, ctx)
        rows = self.answered(ctx)
        answers = replace(self, data=(str(ctx.out / COMPLETIONS),), data_weights=())
        texts = ConversationDataset(answers, tokenizer, self.example_length(context), context, ctx)
        rows.by_reason.update(texts.rows.by_reason)
        texts.rows = rows
        return texts

    def answered(self, ctx: StageContext) -> "RowCounts":
        """Write the teacher's answers to the prompts of the data."""
        from fastlm.data.conversations import RowCounts
        from fastlm.data.prompts import read_prompts
        from fastlm.train.teacher import write_completions

        teacher, tokenizer = self.teacher(ctx)
        try:
            # `chat_template` is the student's, which may be of another family
            chat_tokenizer(tokenizer, "")
        except InputError as error:
            told = str(error).removeprefix("chat_template: ")
            raise InputError(f"teacher: expected a chat template of its own; {told}") from None
        rows = RowCounts()
        room = teacher.context_limit - self.max_new_tokens
        questions = []
        for prompt in read_prompts(
            self.data, cache=ctx.cache_dir, skip_bad=self.skip_bad, rows=rows, on_skip=ctx.skipped
        ):
            variables = template_variables(prompt.tools)
            ids = tokenizer.encode_chat(prompt.messages, date=self.date, **variables)
            if len(ids) <= room:
                questions.append((ids, prompt))
            else:
                rows.by_reason["too long for the teacher"] += 1
        found = write_completions(
            ctx.out / COMPLETIONS, teacher, tokenizer, questions,
            temperature=0.0 if self.teacher_completions == "greedy" else self.temperature,
            max_new_tokens=self.max_new_tokens, seed=self.seed, track=ctx.track,
        )  # fmt: skip
        if found < len(questions):
            rows.by_reason["without an answer that ended"] += len(questions) - found
        return rows

    def objective(
        self, ctx: StageContext, model: Any, data: Any, options: "TrainOptions", **common: Any
    ) -> SftObjective:
        if self.teacher_completions:
            return super().objective(ctx, model, data, options, **common)
        args, tokenizer = (model, data.training, data.heldout, options), common["tokenizer"]
        common["rules"] = select_options(self, DistillOptions)
        if self.teacher_logits or self.teacher_top_k:
            stored = self.stored(ctx, model, [*data.training, *data.heldout], tokenizer)
            return TeacherLogitsObjective(*args, stored=stored, **common)
        return TeacherModelObjective(
            *args, teacher=self.load_teacher(ctx, model, tokenizer), **common
        )

    def stored(
        self,
        ctx: StageContext,
        student: "CausalLM",
        examples: "list[Example]",
        tokenizer: "Tokenizer",
    ) -> "TeacherLogits":
        """What the teacher says of the examples, read or measured."""
        from fastlm.train.teacher import TeacherHeader, TeacherLogits, write_logits

        if self.teacher_logits:
            stored = TeacherLogits(Path(self.teacher_logits))
            assert stored.header is not None
            wanted = {"vocab_size": student.config.vocab_size, "temperature": self.temperature}
            for name, value in wanted.items():
                got = getattr(stored.header, name)
                expect(got == value, "teacher_logits", f"{name} {value} of the training", got)
            return stored
        top_k, vocab_size = self.teacher_top_k, student.config.vocab_size
        assert top_k is not None
        most = f"at most the vocabulary of {vocab_size}"
        expect(top_k <= vocab_size, "teacher_top_k", most, top_k)
        teacher = self.load_teacher(ctx, student, tokenizer)
        header = TeacherHeader(weights_digest(teacher), vocab_size, top_k, self.temperature)
        return write_logits(ctx.out / LOGITS, teacher, examples, header, track=ctx.track)

    def teacher(self, ctx: StageContext) -> "tuple[CausalLM, Tokenizer]":
        """Load the teacher, in the training's dtype."""
        import torch

        from fastlm.model.load import load_model

        path = ctx.path("teacher")
        teacher, tokenizer = load_model(path, keep_quantized=False, dtype=torch.float32)
        return teacher.to(getattr(torch, self.dtype)).eval(), tokenizer

    def load_teacher(
        self, ctx: StageContext, student: "CausalLM", tokenizer: "Tokenizer"
    ) -> "CausalLM":
        """Load the teacher. InputError: its vocabulary is not the student's."""
        teacher, own = self.teacher(ctx)
        check_vocabulary("teacher", own, tokenizer)
        size, own_size = student.config.vocab_size, teacher.config.vocab_size
        expect(own_size == size, "teacher", f"a head of the student's {size} tokens", own_size)
        return teacher

    def headline(self) -> tuple[str, str]:
        if self.teacher_completions:
            how = self.teacher_completions
            return "Distillation", f"The student learns {how} answers of the teacher."
        return (
            "Distillation",
            f"The loss is the {DIVERGENCES[self.divergence]} to the teacher, per token.",
        )
