"""Texts -> token examples. The rules:

A prompt's ids are exactly what generation would see: a plain string as the tokenizer encodes it, a conversation as the chat
template renders it with the generation prompt. A response is tokenised on its own and ends, once, with the stop token: eos for
plain text, the template's end-of-turn for a conversation. In a conversation of several turns every assistant's turn is trained;
they are found by rendering prefixes, so the template needs no marks.
"""
import itertools
import re

import numpy as np

from data.bounds import bounded
from data.errors import UserError
from data.pack import Example, Response

LONG = 100      # characters per token of max_length, from which on a text is long ...
HEAD = 32       # ... and how many of them are tokenised, to see whether it is too long


class Tokeniser:
    """A tokenizer and what has to be known about it: the ids it puts before every text, its eos, the template's end of a turn."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.lead = _lead(tokenizer)                          # usually [] or [bos]
        self.eos = tokenizer.eos_token_id
        self.end_of_turn, self.tail = _end_of_turn(tokenizer)  # such as "<|im_end|>" and what follows it, "\n"
        self.control = _control_tokens(tokenizer)

    def encode(self, texts, max_length, train_on="assistant", truncate="none"):
        """For each of `texts`, in order: its examples (one; raw text may give several pieces), or the reason (str) to drop it.

        `max_length` limits prompt + one response. `train_on`: "assistant", or "all" tokens but the first of prompt and response
        (sft only). `truncate`: "none" drops what is too long, "prompt" keeps the end of its prompt instead.
        Raises UserError when the template cannot be used: missing, or it rewrites earlier turns.
        """
        rendered = []
        with bounded(texts[0].where if texts else "", sum(map(_characters, texts))) as row:
            for text in texts:
                row(text.where)
                rendered.append(self._render(text))
        for i, text in enumerate(texts):
            rendered[i] = self._unless_too_long(rendered[i], text, max_length, truncate)
        strings = []  # of all texts at once: fast tokenizers are much faster on many strings
        for item in rendered:
            if not isinstance(item, str):
                prompt, responses = item
                strings += [prompt, *(string for pieces in responses for string, _ in pieces)]
        ids = iter(self._ids(strings))
        results = []
        for text, item in zip(texts, rendered):
            if isinstance(item, str):
                results.append(item)
                continue
            plain = isinstance(text.prompt, str)
            prompt = self._prompt(next(ids), plain)
            responses = [self._response([(next(ids), trained) for _, trained in pieces], plain) for pieces in item[1]]
            if text.raw:
                results.append(_pieces(self._prompt(responses[0].tokens.tolist(), plain), max_length, text.where))
            else:
                results.append(_example(prompt, responses, text.where, max_length, train_on, truncate))
        return results

    def holds_control_tokens(self, text):
        """Whether a message that is not trained spells out a special token: the tokenizer reads it as that
        token, in generation too, so the turn ends, or another one begins, within it. In plain strings that
        may be meant."""
        if isinstance(text.prompt, str):
            return False
        said = [turn["content"] for turn in text.prompt]
        for turns in text.responses:
            said += [turn["content"] for turn in turns if turn["role"] != "assistant"]
        return any(map(self.control.search, said))

    def _unless_too_long(self, item, text, max_length, truncate):
        """`item`, which `_render` returned, or the reason to drop it: a book need not be tokenised to its end
        for a max_length of 512."""
        if isinstance(item, str) or text.raw:
            return item
        prompt, responses = item
        strings = [string for string, _ in itertools.chain(*responses)]
        if truncate != "prompt":
            strings.append(prompt)
        too_long = any(self._too_long(string, max_length) for string in strings)
        return "longer than max_length" if too_long else item

    def _too_long(self, string, max_length):
        """Whether a text is long and its beginning alone has twice as many tokens as there may be. What
        follows could change the last few of these, not half of them."""
        if len(string) < LONG * max_length:
            return False
        ids, = self._ids([string[:HEAD * max_length]])
        return len(ids) > 2 * max_length

    def prompt_ids(self, prompt):
        """The ids (list of int) with which generation starts for a prompt, a string or messages: the same as in training."""
        try:
            string = prompt
            if not isinstance(prompt, str):
                with bounded("the prompt"):
                    string = self._render_messages(prompt, True, "the prompt")
        except _Refused as refused:
            raise UserError(f"the chat template refuses the prompt ({refused}); "
                            "fix: change its turns or use another template") from None
        return self._prompt(self._ids([string])[0], isinstance(prompt, str)).tolist()

    def _prompt(self, ids, plain):
        if plain and ids[:len(self.lead)] != self.lead:  # the text may itself spell out the BOS
            ids = self.lead + ids
        return np.array(ids, dtype=np.int32)

    def _response(self, pieces, plain):
        """One response from its pieces [(ids, trained)], with eos at the end where nothing else ends it."""
        ids = pieces[-1][0]
        if (plain or self.end_of_turn is None) and (not ids or ids[-1] != self.eos):
            if self.eos is None:
                raise UserError("the tokenizer has no eos token, so a response cannot end; "
                                "fix: set eos_token in tokenizer_config.json")
            ids.append(self.eos)
        tokens = np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in pieces])
        trained = np.concatenate([np.full(len(ids), trained) for ids, trained in pieces])
        return Response(tokens, trained)

    def _ids(self, strings):
        if not strings:
            return []
        return self.tokenizer(strings, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
                              verbose=False).input_ids  # verbose=False: lengths are our own business

    # ---- conversations ----

    def _render(self, text):
        """Text -> (prompt, [pieces of each response]) with pieces [(string, trained)], or the reason (str) to drop it."""
        if isinstance(text.prompt, str):
            return text.prompt, [[(response, True)] for response in text.responses]
        try:
            prompt = self._render_messages(text.prompt, True, text.where)
            return prompt, [self._turns(text.prompt, prompt, turns, text.where) for turns in text.responses]
        except _Refused as refused:
            return f"the chat template refuses it: {refused}"

    def _turns(self, prompt_messages, prompt, turns, where):
        """Pieces of a response: the assistant's turns are trained, what the template renders between them is not."""
        pieces, done = [], prompt
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            history = prompt_messages + turns[:i]
            before = prompt if i == 0 else self._render_messages(history, True, where)
            through = self._render_messages(history + [turn], False, where)
            if not before.startswith(done):
                raise UserError(f"the chat template rewrites earlier turns of the conversation in {where}, so they cannot all be "
                                "trained as they were generated; "
                                "fix: give each assistant's turn a row of its own (prompt + response)")
            if not through.startswith(before):
                raise UserError(f"the chat template's generation prompt is not how it renders the assistant's turn in {where}; "
                                "fix: use prompt and response strings or another chat template")
            if len(before) > len(done):
                pieces.append((before[len(done):], False))
            reply = self._reply(through[len(before):], where)
            pieces.append((reply, True))
            done = before + reply
        return pieces

    def _reply(self, rendered, where):
        """An assistant's turn through its end-of-turn; what the template writes after that is context for the next turn."""
        if self.end_of_turn is None:
            return rendered.removesuffix(self.tail)
        end = rendered.rfind(self.end_of_turn)  # the last one: the text itself may hold such a token
        if end < 0:
            raise UserError(f"the chat template does not end the assistant's turn with {self.end_of_turn} in {where}; "
                            "fix: use another chat template")
        return rendered[:end + len(self.end_of_turn)]

    def _render_messages(self, messages, generation_prompt, where):
        if not self.tokenizer.chat_template:
            raise UserError(f"a conversation in {where}, but the tokenizer has no chat template; "
                            "fix: use prompt and response strings or a tokenizer with a chat template")
        return _apply_template(self.tokenizer, messages, generation_prompt, where)


def stop_ids(tokenizer):
    """The ids, sorted, at which generation must stop: eos and the chat template's end-of-turn."""
    end_of_turn, _ = _end_of_turn(tokenizer)
    ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end_of_turn) if end_of_turn else None}
    return sorted(ids - {None})


class _Refused(Exception):
    """The chat template raised an error for these messages: roles that do not alternate, no system turn allowed, ..."""


def _apply_template(tokenizer, messages, generation_prompt, where):
    import jinja2
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except jinja2.TemplateError as error:
        raise _Refused((str(error).splitlines() or [""])[0][:200]) from None
    except MemoryError:                    # `bounded` says so
        raise
    except Exception as error:  # noqa: BLE001  a template is a program
        said = f"{type(error).__name__}: {' '.join(str(error)[:400].split())[:200]}"
        raise UserError(f"the chat template fails ({said}) in {where}; fix: use another template") from error


def _end_of_turn(tokenizer):
    """(token with which the template ends an assistant's turn or None, all that it writes after the turn's text)."""
    if not tokenizer.chat_template:
        return None, ""
    reply, where = "PROBE-OF-THE-END", "one question and its answer"
    try:
        with bounded(where):
            messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": reply}]
            rendered = _apply_template(tokenizer, messages, False, where)
    except _Refused as refused:
        raise UserError(f"the chat template cannot render {where} ({refused}); "
                        "fix: use another chat template") from None
    after = rendered[rendered.rfind(reply) + len(reply):]
    # White space can be an added token too (Gemma, Phi), but it ends no turn.
    tokens = [token for token in {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
              if token.strip() and token in after]
    if not tokens:
        return None, after
    return min(tokens, key=lambda token: (after.find(token), -len(token))), after


def _control_tokens(tokenizer):
    """The pattern that finds a special token in a text."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")      # (?!) matches nothing


def _lead(tokenizer):
    """The ids that the tokenizer puts before every text; those that it appends (eos) are not wanted."""
    whole = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    start = next(i for i in range(len(whole)) if whole[i:i + len(bare)] == bare)
    return whole[:start]


# ---- lengths ----

def _characters(text):
    if isinstance(text.prompt, str):
        return 0                                 # no template
    turns = [*text.prompt, *itertools.chain(*text.responses)]
    return sum(len(turn["content"]) for turn in turns)


def _example(prompt, responses, where, max_length, train_on, truncate):
    if not len(prompt):
        return "empty prompt"
    room = max_length - max((len(response.tokens) for response in responses), default=0)
    if len(prompt) > room:
        if truncate != "prompt" or room < 1:
            return "longer than max_length"
        prompt = prompt[-room:]
    if train_on == "all":
        responses = [Response.all_trained(np.concatenate([prompt[1:], response.tokens])) for response in responses]
        prompt = prompt[:1]
    return [Example(prompt, responses, where)]


def _pieces(tokens, max_length, where):
    """Raw text in consecutive pieces of at most max_length tokens; the first token of each is context, the rest is trained."""
    starts = list(range(0, len(tokens), max_length))
    if len(starts) > 1 and len(tokens) - starts[-1] == 1:
        starts[-1] -= 1  # a last piece of one token would train nothing: leave it a context
    pieces = [tokens[start:end] for start, end in zip(starts, starts[1:] + [len(tokens)])]
    return [Example(piece[:1], [Response.all_trained(piece[1:])], where) for piece in pieces if len(piece) > 1]
