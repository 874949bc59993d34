"""Texts -> token examples. What is trained is what generation sees:

A prompt's ids are exactly those that generation starts with: a plain string as the tokenizer encodes it, a
conversation as the chat template renders it with the generation prompt. A response is what follows them where
prompt and response are tokenised as one text. It ends, once, with the stop token: eos for plain text, the
template's end-of-turn for a conversation. In a conversation every assistant's turn is trained, unless its
message says otherwise. A turn goes on in the example of the turn before it where its context starts with that
example's tokens, else it is an example of its own.
"""
import itertools

import numpy as np

from data.bounds import bounded
from data.chat import Chat, Unusable, any_of
from data.errors import UserError
from data.pack import Example, Response

LONG = 100      # characters per token of max_length, from which on a text is long ...
HEAD = 32       # ... and how many of them are tokenised, to see whether it is too long
NEAR = 200      # characters before the end of a context in which its last special token is looked for


class Tokeniser:
    """A tokenizer and what has to be known about it: the ids it puts before every text, its eos, its chat
    template.

    Counts what `encode` did. `split`: the conversations that became several examples. `continued`: `where` of
    the responses that are tokenised on their own, because a token would span the end of the prompt."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer)
        self.lead = _lead(tokenizer)                          # usually [] or [bos]
        self.eos = tokenizer.eos_token_id
        self.anchor = self._anchor()
        self.cuts = _cuts(tokenizer)
        self.split, self.continued = 0, []

    def encode(self, texts, max_length, train_on="assistant", truncate="none"):
        """For each of `texts`, in order: its examples, or the reason (str) to drop it. A text is one example;
        raw text is one per piece, and a conversation one per turn whose context does not continue the turn
        before.

        `max_length` limits prompt + one response. `train_on`: "assistant", or "all" tokens but the first of
        prompt and response (sft only). `truncate`: "none" drops what is too long, "prompt" keeps the end of
        its prompt. Raises UserError when the template cannot be used, or leaves out a part of a row.
        """
        if not texts:
            return []
        rendered = []
        with bounded(texts[0].where, sum(map(_characters, texts))) as row:
            for text in texts:
                row(text.where)
                rendered.append(self._render(text))
        items = []
        strings = {}      # string -> None: a set in the order in which they came
        for text, item in zip(texts, rendered):
            item = self._unless_too_long(item, text, max_length, truncate)
            items.append(item)
            if not isinstance(item, str):
                context, responses = item
                strings[context] = None
                for before, reply in itertools.chain(*responses):
                    border = self._border(before)
                    strings[before] = None
                    strings[border] = None
                    strings[border + reply] = None
        ids = self._ids_of_all(strings)
        results = []
        for text, item in zip(texts, items):
            if not isinstance(item, str):
                context, responses = item
                try:
                    item = self._examples(text, context, responses, ids, max_length, train_on, truncate)
                except Unusable as reason:
                    item = str(reason)
            results.append(item)
        return results

    def holds_control_tokens(self, text):
        """Whether a message that is not trained spells out a special token: the tokenizer reads it as that
        token, in generation too, so the turn ends, or another one begins, within it. In plain strings that
        may be meant."""
        if isinstance(text.prompt, str):
            return False
        said = [turn["content"] for turn in text.prompt]
        for turn in itertools.chain(*text.responses):
            if turn["role"] != "assistant":
                said.append(turn["content"])
        return any(map(self.chat.control.search, said))

    def prompt_ids(self, prompt):
        """The ids (list of int) with which generation starts for a prompt, a string or messages: as in
        training."""
        text = prompt
        if not isinstance(prompt, str):
            try:
                with bounded("the prompt"):
                    text = self.chat.prompt(prompt, None, "the prompt")
            except Unusable as reason:
                raise UserError(f"the prompt cannot be used ({reason}); "
                                "fix: change its turns or give another chat_template") from None
        return self._led(self._ids([text])[0], isinstance(prompt, str))

    # ---- text ----

    def _render(self, text):
        """Text -> (context, [turns of each response]) with turns [(context, reply)], or the reason (str) to
        drop it."""
        if isinstance(text.prompt, str):
            return text.prompt, [[(text.prompt, response)] for response in text.responses]
        try:
            context = self.chat.prompt(text.prompt, text.tools, text.where)
            replies = []
            for turns in text.responses:
                replies.append(self.chat.replies(text.prompt, context, turns, text.tools, text.where))
            return context, replies
        except Unusable as reason:
            return str(reason)

    def _unless_too_long(self, item, text, max_length, truncate):
        """`item`, which `_render` returned, or the reason to drop it: a book need not be tokenised to its end
        for a max_length of 512."""
        if isinstance(item, str) or text.raw:
            return item
        context, responses = item
        strings = [reply for _, reply in itertools.chain(*responses)]
        if truncate != "prompt":
            strings.append(context)
        for string in strings:
            if self._too_long(string, max_length):
                return "longer than max_length"
        return item

    def _too_long(self, string, max_length):
        """Whether a text is long and its beginning alone has twice as many tokens as there may be. What
        follows could change the last few of these, not half of them."""
        if len(string) < LONG * max_length:
            return False
        ids, = self._ids([string[:HEAD * max_length]])
        return len(ids) > 2 * max_length

    # ---- tokens ----

    def _examples(self, text, context, responses, ids, max_length, train_on, truncate):
        """A row's examples, or the reason to drop it; `ids`: {text: its ids}."""
        plain = isinstance(text.prompt, str)
        if text.raw:
            tokens = self._led(self._ended(ids[responses[0][0][1]], plain), plain)
            return _pieces(np.array(tokens, np.int32), max_length, text.where)
        if not responses:
            prompt = self._led(ids[context], plain)
            return _example(prompt, [], text.where, max_length, train_on, truncate)
        chains = [self._chain(turns, plain, ids, text.where) for turns in responses]
        chain = chains[0]
        if len(chains) > 1:                                # a pair: one turn each
            prompt, chosen = chain[0]
            _, rejected = chains[1][0]
            if chosen.tokens.tolist() == rejected.tokens.tolist():
                return "chosen equals rejected"
            return _example(prompt, [chosen, rejected], text.where, max_length, train_on, truncate)
        if train_on == "all" and len(chain) > 1:           # every context would be trained again and again
            whole = self.chat.whole([*text.prompt, *text.responses[0]], text.tools, text.where)
            first, *rest = self._ids([whole])[0]
            chain = [([first], Response.all_trained(self._ended(rest, plain)))]
        self.split += len(chain) > 1
        found = []
        for prompt, response in chain:
            examples = _example(prompt, [response], text.where, max_length, train_on, truncate)
            if isinstance(examples, str):
                return examples
            found += examples
        return found

    def _chain(self, turns, plain, ids, where):
        """[(context, reply)] -> [(prompt's ids, Response)]. A turn whose context starts with all ids of the
        turn before goes on in the same response. What lies between them is not trained."""
        chain = []
        for context, reply in turns:
            prompt, tokens = self._joined(context, reply, plain, ids, where)
            if chain:
                start, done, trained = chain[-1]
                stood = len(start) + len(done)
                if prompt[:stood] == start + done:
                    between = prompt[stood:]
                    done += between + tokens
                    trained += [False] * len(between) + [True] * len(tokens)
                    continue
            chain.append((prompt, tokens, [True] * len(tokens)))
        found = []
        for prompt, tokens, trained in chain:
            found.append((prompt, Response(np.array(tokens, np.int32), np.array(trained))))
        return found

    def _joined(self, context, reply, plain, ids, where):
        """(ids of the context, ids of the reply behind it). Raises Unusable where they do not spell the
        text."""
        border = self._border(context)
        before, both = ids[border], ids[border + reply]
        tokens = both[len(before):]
        prompt = self._led(ids[context], plain)
        if both[:len(before)] != before:           # a token spans both; generation starts with the prompt's
            tokens = self._continuation(reply)
            if self._decode(before + tokens) != self._decode(both):
                raise Unusable("no tokens of its response continue the tokens of its prompt")
            self.continued.append(where)
        return prompt, self._ended(tokens, plain)

    def _ids_of_all(self, strings):
        """{string: its ids}. Each section is tokenised once, since a conversation's later contexts hold the
        earlier ones. Fast tokenizers are much faster on many strings."""
        cut = list(map(self._sections, strings))
        sections = list(dict.fromkeys(itertools.chain(*cut)))
        known = dict(zip(sections, self._ids(sections)))
        ids = {}
        for string, parts in zip(strings, cut):
            joined = []
            for part in parts:
                joined += known[part]
            ids[string] = joined
        return ids

    def _sections(self, string):
        """A string cut before its special tokens, see `_border`."""
        sections, start = [], 0
        for found in self.cuts.finditer(string):
            if found.start() > start:
                sections.append(string[start:found.start()])
                start = found.start()
        if start < len(string):
            sections.append(string[start:])
        return sections

    def _border(self, context):
        """The end of a context, from its last special token on: a tokenizer splits a text at these, so what
        stands before one does not change the tokens behind it. Where none is near, the whole context."""
        near = context[-NEAR:]
        *_, last = [None, *self.chat.control.finditer(near)]
        return near[last.start():] if last else context

    def _continuation(self, text):
        """The ids of a text that follows another one, without the space that some tokenizers put before every
        text."""
        anchored, anchor, alone = self._ids([self.anchor + text, self.anchor, text])
        return anchored[len(anchor):] if anchored[:len(anchor)] == anchor else alone

    def _anchor(self):
        """A text behind which the tokenizer puts no space, if it puts one before every text, else ""."""
        both, anchor, alone = self._ids(["\na", "\n", "a"])
        return "\n" if both[:len(anchor)] == anchor and both[len(anchor):] != alone else ""

    def _ended(self, ids, plain):
        """The ids of a response with eos at the end, where nothing else ends it."""
        has_end = ids and ids[-1] == self.eos
        if has_end or not plain and self.chat.end_of_turn:
            return ids
        if self.eos is None:
            raise UserError("the tokenizer has no eos token, so a response cannot end; "
                            "fix: set eos_token in tokenizer_config.json")
        return [*ids, self.eos]

    def _led(self, ids, plain):
        """The ids with what stands before every text; the text may itself spell out the BOS."""
        return self.lead + ids if plain and ids[:len(self.lead)] != self.lead else ids

    def _ids(self, strings):
        if not strings:
            return []
        # verbose=False: lengths are our own business
        return self.tokenizer(strings, add_special_tokens=False, return_attention_mask=False,
                              return_token_type_ids=False, verbose=False).input_ids

    def _decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def stop_ids(tokenizer):
    """The ids, sorted, at which generation must stop: those that end a response, and those at which the start
    model stops by its own settings (`model.load.load_tokenizer` notes them)."""
    return sorted({*end_ids(tokenizer), *getattr(tokenizer, "model_stops", [])})


def end_ids(tokenizer):
    """The ids, sorted, that end a response in the data: eos, and the chat template's end of a turn and a tool
    call."""
    chat = Chat(tokenizer)
    ids = {tokenizer.eos_token_id}
    for name in chat.end_of_turn, chat.end_of_call():
        if name is not None:
            ids.add(tokenizer.convert_tokens_to_ids(name))
    return sorted(ids - {None})


def _cuts(tokenizer):
    """The pattern of the special tokens before which a text can be cut. Some look at what is before them."""
    names = []
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and not token.lstrip and not token.single_word:
            names.append(token.content)
    return any_of(names)


def _lead(tokenizer):
    """The ids that the tokenizer puts before every text; those that it appends (eos) are not wanted."""
    whole = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    for start in range(len(whole)):
        if whole[start:start + len(bare)] == bare:
            return whole[:start]
    return []


# ---- lengths ----

def _characters(text):
    if isinstance(text.prompt, str):
        return 0                                 # no template
    count = 0
    for turn in itertools.chain(text.prompt, *text.responses):
        count += len(turn["content"]) + len(turn.get("reasoning_content", ""))
    return count


def _example(prompt, responses, where, max_length, train_on, truncate):
    if not len(prompt):
        return "empty prompt"
    lengths = [len(response.tokens) for response in responses]
    room = max_length - max(lengths, default=0)
    if len(prompt) > room:
        if truncate != "prompt" or room < 1:
            return "longer than max_length"
        prompt = prompt[-room:]
    prompt = np.array(prompt, np.int32)
    if train_on == "all":
        whole = [np.concatenate([prompt[1:], response.tokens]) for response in responses]
        responses = list(map(Response.all_trained, whole))
        prompt = prompt[:1]
    return [Example(prompt, responses, where)]


def _pieces(tokens, max_length, where):
    """Raw text in consecutive pieces of at most max_length tokens. The first token of each is context, the
    rest is trained."""
    starts = list(range(0, len(tokens), max_length))
    if len(starts) > 1 and len(tokens) - starts[-1] == 1:
        starts[-1] -= 1  # a last piece of one token would train nothing: leave it a context
    ends = [*starts[1:], len(tokens)]
    examples = []
    for start, end in zip(starts, ends):
        if end - start > 1:
            response = Response.all_trained(tokens[start + 1:end])
            examples.append(Example(tokens[start:start + 1], [response], where))
    return examples
