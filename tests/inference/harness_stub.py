"""The parts of lm-evaluation-harness 0.4.13 that our model builds on, for machines without it."""

import sys
from types import ModuleType, SimpleNamespace


class TemplateLM:
    def __init__(self):
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    def _encode_pair(self, context, continuation):
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        whole, before = self.tok_encode(context + continuation), self.tok_encode(context)
        return before, whole[len(before) :]

    def loglikelihood(self, requests, disable_tqdm=False):
        asked = []
        for context, continuation in (request.args for request in requests):
            pair = self._encode_pair(context, continuation) if context else (
                [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False))  # fmt: skip
            asked.append(((context, continuation), *pair))
        return self._loglikelihood_tokens(asked)


def get_rolling_token_windows(token_list, prefix_token, max_seq_len, context_len):
    first = min(max_seq_len, len(token_list))
    yield [prefix_token, *token_list[: first - 1]], token_list[:first]
    done = first
    while done < len(token_list):
        count = min(len(token_list) - done, max_seq_len - context_len + 1)
        end = done + count
        yield token_list[end - max_seq_len - 1 : end - 1], token_list[end - count : end]
        done = end


def make_disjoint_window(pair):
    context, continuation = pair
    return context[: len(context) - (len(continuation) - 1)], continuation


def install(monkeypatch):
    names = {
        "lm_eval": {}, "lm_eval.api": {}, "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.utils": {"get_rolling_token_windows": get_rolling_token_windows,
                          "make_disjoint_window": make_disjoint_window},
    }  # fmt: skip
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
