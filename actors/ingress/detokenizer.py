"""Interim: replaced by the full one."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DetokenizedText:
    text: str
    stopped: bool


class Detokenizer:
    def __init__(self, tokenizer, stop=(), skip_ids=frozenset()):
        self._t, self._stop, self._skip, self._ids, self._sent = tokenizer, stop, skip_ids, [], ""

    def push(self, ids):
        self._ids += [i for i in ids if i not in self._skip]
        text = self._t.decode(self._ids, skip_special_tokens=False)
        if text.endswith("\ufffd"):
            return DetokenizedText("", False)
        for s in self._stop:
            at = text.find(s)
            if at >= 0:
                out, self._sent = text[len(self._sent) : at], text[:at]
                return DetokenizedText(out, True)
        out, self._sent = text[len(self._sent) :], text
        return DetokenizedText(out, False)

    def finish(self):
        return ""
