"""How texts become tokens of a run, without its weights: for our tasks, and for those of lm-eval.

`Reader` treats special tokens that are spelt out in a text as letters, as the command `generate`
does. `LmEvalReader` makes the tokens of lm-eval's backend for transformers, to which they are
special tokens.
"""

from dataclasses import dataclass
from pathlib import Path

from hybrid_train.checkpoint import layout
from hybrid_train.config import frozen
from hybrid_train.data.any_tokenizer import FolderTokenizer, open_tokenizer
from hybrid_train.generation.chat import ChatTemplate, open_template
from hybrid_train.generation.scoring import Text
from hybrid_train.hf.origin import Origin
from hybrid_train.schema.evaluation import Harness
from hybrid_train.schema.problems import UserError


@dataclass(frozen=True)
class Reader:
    """What turns text into the tokens of a run and back, without its weights.

    Attributes:
        tokenizer: of the run.
        begins: whether a prompt begins with what the tokenizer puts around a text, as what the
            model was trained on did.
        ends: tokens that end an answer.
        is_packed: whether the model was trained on documents that do not see each other.
    """

    tokenizer: FolderTokenizer
    begins: bool
    ends: frozenset[int]
    is_packed: bool = False

    @classmethod
    def of(cls, run_dir: Path, *, is_packed: bool) -> "Reader":
        """Open what lies in a run folder.

        Raises:
            UserError: if there is no tokenizer, or a file is damaged.
        """
        tokenizer, origin = open_tokenizer(run_dir / layout.TOKENIZER), Origin.of(run_dir)
        return cls(tokenizer, origin.is_same_tokenizer, origin.ends(tokenizer), is_packed)

    @property
    def before_document(self) -> list[int]:
        """What stands before a document: a BOS token, the end of the one before, or nothing."""
        around = self.tokenizer.encode_prompt("", begin=self.begins, special=False)
        return around or ([] if self.is_packed else [self.tokenizer.end_of_document])

    def prompt(self, text: str) -> list[int]:
        """Encode a prompt; behind an empty one a text begins anew."""
        ids = self.tokenizer.encode_prompt(text, begin=self.begins, special=False)
        return ids or [self.tokenizer.end_of_document]

    def continued(self, prompt: str, choice: str) -> tuple[Text, bool]:
        """Encode a prompt with what follows it, which is what is scored.

        Returns:
            The text, and whether it is encoded as one. Where tokens merge across the border, both
            are encoded apart, as lm-eval does: a token of both would belong to neither.
        """
        before = self.prompt(prompt)
        whole = self.tokenizer.encode_prompt(prompt + choice, begin=self.begins, special=False)
        is_joint = bool(prompt) and len(whole) > len(before) and whole[: len(before)] == before
        if not is_joint:
            whole = before + self.tokenizer.encode(choice)
        return Text(whole, len(before)), is_joint or not prompt


@dataclass(frozen=True)
class LmEvalReader:
    """How texts of lm-eval's tasks become tokens of a run.

    Attributes:
        tokenizer: of the run.
        begin: whether a text begins as the tokenizer says.
        prefix: the token that an empty context is: BOS, or the end of a document.
        ends: tokens that end an answer.
        max_length: tokens that the model reads at once.
        template: of conversations; None: prompts are texts.
    """

    tokenizer: FolderTokenizer
    begin: bool
    prefix: int
    ends: frozenset[int]
    max_length: int
    template: ChatTemplate | None

    @classmethod
    def of(cls, run_dir: Path, settings: Harness) -> "LmEvalReader":
        """Read what lies beside the weights of a run.

        Raises:
            UserError: if a file is missing or damaged, the model does not know all tokens of the
                tokenizer, or there is no chat template.
        """
        tokenizer, origin = open_tokenizer(run_dir / layout.TOKENIZER), Origin.of(run_dir)
        job, template = frozen.load(run_dir), None
        known = job.model.vocab_size
        if known is not None and tokenizer.vocab_size > known:
            error = UserError(
                f"{run_dir / layout.TOKENIZER} has {tokenizer.vocab_size} tokens, but the model "
                f"knows {known}: this is not the tokenizer that it was trained with; put that there"
            )
            error.on_all_ranks = True
            raise error
        if settings.apply_chat_template:
            folders = [run_dir / layout.TOKENIZER]
            if origin.folder is not None and origin.is_same_tokenizer:
                folders.insert(0, origin.folder)
            template = open_template(folders, settings.template, has_tools=False)
        return cls(
            tokenizer=tokenizer,
            begin=origin.is_same_tokenizer if settings.bos is None else settings.bos,
            prefix=tokenizer.special_ids.get("bos_token", tokenizer.end_of_document),
            ends=origin.ends(tokenizer),
            max_length=settings.max_length or job.train.sequence_length,
            template=template,
        )

    def encode(self, text: str, *, begin: bool | None = None) -> list[int]:
        """Turn text into tokens as lm-eval's transformers backend does.

        Args:
            text: in which special tokens that are spelt out are these tokens.
            begin: begin as the tokenizer does; None: as the run says, where the text does not
                begin so already.
        """
        if begin is None:
            spelt = self.tokenizer.decode([self.prefix])
            begin = self.begin and not (spelt and text.startswith(spelt))
        return self.tokenizer.encode_prompt(text, begin=begin, special=True)
