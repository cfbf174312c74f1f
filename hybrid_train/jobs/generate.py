"""The job `generate`: text from a checkpoint, for one or several prompts."""

from pathlib import Path

from hybrid_train.config.launcher import require_alone
from hybrid_train.config.problems import UserError
from hybrid_train.config.schema.generate import GenerateJob
from hybrid_train.generation.text import GrowingText, show
from hybrid_train.runtime.start import process


def run(job: GenerateJob) -> None:
    """Write each prompt with its continuation to stdout, and the speed to stderr."""
    texts = _prompts(job)
    require_alone("generate")
    with process(job.runtime, job.seed):
        from hybrid_train.generation.decode import Settings, stream  # needs the process
        from hybrid_train.jobs.assemble import load_model
        from hybrid_train.parallel.groups import destroy_groups

        try:
            loaded = load_model(job.checkpoint, job.runtime)
            tokenizer = loaded.tokenizer
            settings = Settings(
                temperature=job.temperature, top_k=job.top_k, top_p=job.top_p, seed=job.seed,
                max_new_tokens=job.max_new_tokens, vocab_size=tokenizer.vocab_size,
                end_of_document=tokenizer.end_of_document,
            )  # fmt: skip
            # A text begins behind the end of the document before it.
            prompts = [tokenizer.encode(text) or [tokenizer.end_of_document] for text in texts]
            growing = [GrowingText(tokenizer, prompt) for prompt in prompts]
            show(texts, growing, stream(loaded.model, prompts, settings))
        finally:
            destroy_groups()


def _prompts(job: GenerateJob) -> list[str]:
    """Return the prompts of the command line, then those of the file."""
    if job.prompt_file is None:
        return job.prompt
    try:
        lines = Path(job.prompt_file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file = {job.prompt_file}: cannot be read: {error}") from error
    prompts = job.prompt + [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompt_file = {job.prompt_file}: needs one prompt per line; it is empty")
    return prompts
