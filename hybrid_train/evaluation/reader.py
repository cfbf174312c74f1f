"""How texts become tokens of a run, as lm-eval's backend for transformers makes them; no weights.

Not here: prompts of the command `generate`, whose special tokens are letters unless asked for
(`jobs/generate.py`).
"""

from dataclasses import dataclass
from pathlib import Path

from hybrid_train.checkpoint import layout
from hybrid_train.config import frozen
from hybrid_train.data.any_tokenizer import FolderTokenizer, open_tokenizer
from hybrid_train.generation.chat import ChatTemplate, open_template
from hybrid_train.hf.origin import Origin
from hybrid_train.schema.evaluation import Harness
from hybrid_train.schema.problems import UserError


@dataclass(frozen=True)
class LmEvalReader:
    """How texts become tokens of a run, without its weights.

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
