"""Requests in, new tokens out."""

from collections.abc import Iterable, Iterator

import torch

from hybrid_train.generation.decode import Cache, _evaluating
from hybrid_train.generation.requests import Finish, NewTokens, Request
from hybrid_train.generation.sampling import Place, choose
from hybrid_train.megatron.hybrid import Hybrid


def stream(
    model: Hybrid, requests: Iterable[Request], *, vocab_size: int, batch: int = 8
) -> Iterator[NewTokens]:
    """Continue requests, `batch` of them together, and yield what each step adds to each.

    Requests are taken one by one, as places become free.

    Args:
        model: a whole model.
        requests: prompts with what is asked for.
        vocab_size: ids from here on are padding of the vocabulary and never chosen.
        batch: answers that grow together.
    """
    for number, request in enumerate(requests):
        watcher, answer = request.watch(), list[int]()
        with _evaluating(model):
            cache = Cache(model, 1, len(request.prompt) + request.max_new_tokens)
            tokens, finish = list(request.prompt), None
            while finish is None:
                logits = cache.read(torch.tensor([tokens]))[:, :vocab_size]
                place = Place(request.sampling, len(answer), [*request.prompt, *answer])
                token = watcher.forced()
                if token is None:
                    token = int(choose(logits, [place]))
                answer.append(token)
                tokens = [token]
                if token in request.ends:
                    finish = Finish.end
                elif watcher.take(token):
                    finish = Finish.stop
                elif len(answer) == request.max_new_tokens:
                    finish = Finish.length
                log_prob = float(logits.float().log_softmax(-1)[0, token])
                yield NewTokens(request=number, tokens=[token], log_probs=[log_prob], finish=finish)
