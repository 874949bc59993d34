"""Conversations -> text, exactly as generation sees it.

Every trained turn of the assistant is a context and a reply. The context is what the chat template renders of
all turns before it, with the generation prompt. The reply is what the model has to write then, through its
end-of-turn. A template may render earlier turns otherwise than the last one, so a turn is rendered as the
last one, whichever turns follow it.
"""
import contextlib
import json
import re

from data.bounds import bounded
from data.errors import UserError, said_first
from data.messages import THOUGHTS, unflagged

MARK = "PROBE"          # a text that no template has a reason to change
QUESTION = [{"role": "user", "content": MARK}]
ANSWER = {"role": "assistant", "content": f"{MARK}-OF-THE-END"}
THINKING_ANSWER = {"role": "assistant", "content": f"<think>\n{MARK}\n</think>\n\n{MARK}"}
TWO_THOUGHTS = re.compile(r"\s*<think>\s*</think>\s*<think>")      # empty ones, and then those of the reply
CALL_FORMS = ("mapping", "json")                              # how templates take the arguments of a call


class Unusable(Exception):
    """Why a conversation cannot be trained on; its row is dropped and counted."""


class Chat:
    """A chat template and what has to be known about it: how it ends a turn, and which parts of a row it
    leaves out."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.control = _control_tokens(tokenizer)
        self.call_form = CALL_FORMS[0]
        self.in_parts = False        # whether a content is a list of parts, as in templates for images
        self.opened = ""             # what opens thoughts in the generation prompt, such as "<think>\n"
        self.thoughts_apart = False  # whether the template finds thoughts in reasoning_content only
        self.left_out = {}           # shape of a conversation -> what the template leaves out of it, or None
        self.end_of_turn = None      # such as "<|im_end|>"
        self.tail = ""               # all that follows a turn's text, such as "<|im_end|>\n"
        if tokenizer.chat_template:
            self._probe()

    # ---- what generation starts with, and what it must write ----

    def prompt(self, messages, tools, where):
        """The text (str) with which generation starts. A last turn of the assistant's is continued."""
        self._check(messages, tools, where)
        if messages[-1]["role"] != "assistant":
            return self.render(messages, tools, True, where)
        *history, begun = messages
        context = self.render(history, tools, True, where)
        content = begun["content"].lstrip()
        if content.startswith("<think>"):              # templates close or drop thoughts that have no end
            if context.rstrip().endswith("</think>"):
                raise Unusable("the generation prompt closes the thoughts, but the turn opens some")
            return context + _behind(_opened(context), content)
        written = self._reply(history, begun, tools, context, where).removesuffix(self.end_of_turn or "")
        _, end, said = content.rpartition("</think>")
        said = said.lstrip() or end + said             # where the thoughts have just ended
        if not said:
            return context
        for text in (said, said.rstrip()):             # some templates strip a content
            start = written.rfind(text)
            if start >= 0:
                return context + written[:start + len(text)]
        raise Unusable("the chat template changes the text of the assistant's turn that ends the prompt")

    def replies(self, prompt, start, turns, tools, where):
        """[(context, reply)] of the assistant's turns among `turns`, which follow the messages `prompt`;
        `start`: the text of these, as the method `prompt` gives it. Turns that are not to be trained are
        context only. Raises Unusable, and UserError where the template leaves something out."""
        found = []
        is_begun = prompt[-1]["role"] == "assistant"   # by the prompt, which continues in the first turn
        if is_begun:
            *prompt, begun = prompt
            turns = [turns[0] | {"content": begun["content"] + turns[0]["content"]}, *turns[1:]]
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant" or not turn.get("train", True):
                continue
            history = [*prompt, *turns[:i]]
            is_known = i == 0 and not is_begun
            before = start if is_known else self.render(history, tools, True, where)
            context = start if i == 0 else before
            self._check([*history, turn], tools, where)
            reply = self._reply(history, turn, tools, before, where)
            _check_thoughts(turn, reply, where)
            if TWO_THOUGHTS.match(_opened(before) + reply):
                raise Unusable("the chat template writes empty thoughts before the reply's, which do not end")
            text = before + reply
            if not text.startswith(context):
                raise Unusable("the chat template does not continue the turn that ends the prompt")
            found.append((context, text[len(context):]))
        if not found:
            raise Unusable("no turn of it is to be trained")
        return found

    def whole(self, messages, tools, where):
        """The text of a whole conversation, through its last end-of-turn. UserError where the template leaves
        thoughts out."""
        text = self._through_end(self.render(messages, tools, False, where))
        for turn in messages:
            if turn["role"] == "assistant":
                _check_thoughts(turn, text, where)
        return text

    def _reply(self, history, turn, tools, context, where):
        """What the model must write behind `context`."""
        rendered = self.render([*history, turn], tools, False, where)
        if rendered.startswith(context):
            return self._through_end(rendered[len(context):])
        # The template writes the history otherwise once a reply follows, or its generation prompt is no part
        # of the turn that it renders. The turn behind a question of its own shows what is to be written.
        before = self.render(QUESTION, tools, True, where)
        generation_prompt = before.removeprefix(self.render(QUESTION, tools, False, where))
        if not context.endswith(generation_prompt):
            raise Unusable("the chat template's generation prompt depends on the turns before it")
        alone = self.render([*QUESTION, turn], tools, False, where)
        opened = _opened(before)
        start = before.removesuffix(opened)
        if not alone.startswith(start):
            if "</think>" in generation_prompt:
                raise Unusable("the generation prompt closes the thoughts, but the reply has some")
            raise Unusable("the chat template's generation prompt is not how it renders the assistant's turn")
        written = alone[len(start):]
        if not opened:
            return self._through_end(written)
        if written.startswith("<think>"):
            return self._through_end(_behind(opened, written))
        said = _with_thoughts(turn)
        if said is None:
            raise Unusable("the generation prompt opens <think>, but the reply has no thoughts")
        answer = said.rpartition("</think>")[2].strip()
        end = written[written.find(answer) + len(answer):]     # it starts with the answer
        return self._through_end(_behind(opened, said) + end)

    def _through_end(self, rendered):
        """A rendering through the end of its last turn. What the template writes after that is context for
        the next one."""
        if self.end_of_turn is None:
            return rendered.removesuffix(self.tail)
        end = rendered.rfind(self.end_of_turn)         # the last one: the text itself may hold such a token
        if end >= 0:
            return rendered[:end + len(self.end_of_turn)]
        if self._last_token(rendered) is None:         # a tool call may end with a token of its own
            raise Unusable(f"the chat template does not end the assistant's turn with {self.end_of_turn}")
        return rendered.rstrip()

    # ---- nothing is left out ----

    def _check(self, messages, tools, where):
        """UserError where the template leaves out a part of the row. Conversations of one shape are rendered
        once, with marks in place of their texts."""
        shape = [bool(tools)]
        for turn in messages:
            calls = len(turn.get("tool_calls", []))
            shape.append((turn["role"], bool(turn["content"]), "reasoning_content" in turn, calls))
        shape = tuple(shape)
        if shape not in self.left_out:
            self.left_out[shape] = self._first_left_out(messages, tools, where)
        if self.left_out[shape]:
            raise UserError(f"the chat template leaves out {self.left_out[shape]} in {where}; "
                            "fix: give another chat_template, or remove that from the row")

    def _first_left_out(self, messages, tools, where):
        """The first part that is not in the rendering, in words, or None."""
        parts, marked = [], []             # parts: [(mark, what it is)]
        for i, turn in enumerate(messages):
            what, is_last = f"the {turn['role']} turn (message {i + 1})", i == len(messages) - 1
            turn = dict(turn)
            calls = turn.get("tool_calls", [])
            if turn["content"]:
                turn["content"] = f"{MARK}{i}TEXT"
                if not calls or is_last:               # what was said beside an earlier call may be left out
                    parts.append((turn["content"], what))
            if calls:
                names = [f"{MARK}{i}CALL{j}" for j in range(len(calls))]
                turn["tool_calls"] = list(map(_named, calls, names))
                parts += [(name, f"the tool calls of {what}") for name in names]
            marked.append(turn)
        names = [f"{MARK}TOOL{i}" for i in range(len(tools or []))]
        tools = list(map(_named, tools or [], names)) or None
        parts += [(name, "the tools") for name in names]
        last = marked.pop() if messages[-1]["role"] == "assistant" else None
        try:
            rendered = self.render(marked, tools, True, where)
            if last:
                rendered += self._reply(marked, last, tools, rendered, where)
        except Unusable:
            return None                                # the row itself will say why
        return next((what for mark, what in parts if mark not in rendered), None)

    # ---- rendering ----

    def render(self, messages, tools, generation_prompt, where):
        """The template's text of the messages. Raises Unusable where it refuses them, UserError where it
        fails."""
        if not self.tokenizer.chat_template:
            raise UserError(f"a conversation in {where}, but the tokenizer has no chat template; "
                            "fix: give chat_template, such as chatml, or use prompt and response strings")
        names = []
        for turn in messages:
            names += [call["function"]["name"] for call in turn.get("tool_calls", [])]
        failure, rendered = None, ""
        for form in (self.call_form, *CALL_FORMS) if names else (None,):
            try:
                turns = [self._for_template(turn, form) for turn in unflagged(messages)]
                rendered = _apply(self.tokenizer, turns, tools, generation_prompt, where)
            except (Unusable, UserError) as error:
                failure = failure or error
                continue
            if all(name in rendered for name in names) and not _in_python(turns, rendered):
                self.call_form = form or self.call_form
                return rendered
        if failure:
            raise failure
        return rendered

    def _for_template(self, turn, call_form):
        """A message as the template reads it."""
        turn = dict(turn)
        if turn["role"] == "assistant":
            begun = turn["content"].partition("</think>")
            if begun[1] and "<think>" not in begun[0]:     # as a model writes it whose prompt has opened them
                turn["content"] = self.opened + turn["content"]
            if self.thoughts_apart:
                turn = _thoughts_apart(turn)
        if "reasoning_content" in turn:
            turn |= dict.fromkeys(THOUGHTS, turn["reasoning_content"])
        if turn.get("tool_calls") and call_form == "json":
            turn["tool_calls"] = list(map(_with_json, turn["tool_calls"]))
        if self.in_parts:
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        return turn

    # ---- what the template is like ----

    def _probe(self):
        """Find out how the template takes a content and ends a turn."""
        where = "one question and its answer"
        try:
            with bounded(where):
                rendered = self._rendered_answer(where)
                self.thoughts_apart = self._doubles_thoughts(where)
                self.opened = _opened(self.render(QUESTION, None, True, where))
        except Unusable as refused:
            raise UserError(f"the chat template cannot render {where} ({refused}); "
                            "fix: give another chat_template") from None
        answer = ANSWER["content"]
        self.tail = rendered[rendered.rfind(answer) + len(answer):]
        # White space can be an added token too (Gemma, Phi), but it ends no turn.
        names = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
        tokens = [name for name in names if name.strip() and name in self.tail]
        self.end_of_turn = min(tokens, key=lambda name: (self.tail.find(name), -len(name)), default=None)

    def _doubles_thoughts(self, where):
        """Whether the template writes thoughts of its own, empty ones, before those of a content."""
        with contextlib.suppress(Unusable, UserError):
            return bool(TWO_THOUGHTS.search(self.render([*QUESTION, THINKING_ANSWER], None, False, where)))
        return False

    def _rendered_answer(self, where):
        """A question and its answer, with contents in parts if the template finds the answer in these
        only."""
        for self.in_parts in (False, True):
            with contextlib.suppress(Unusable, UserError):
                rendered = self.render([*QUESTION, ANSWER], None, False, where)
                if ANSWER["content"] in rendered:
                    return rendered
        self.in_parts = False
        return self.render([*QUESTION, ANSWER], None, False, where)

    def end_of_call(self):
        """The token with which the template ends a turn that calls a tool, or None. Then eos does."""
        call = {"type": "function", "function": {"name": MARK, "arguments": {}}}
        turns = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": [call]}]
        where = "a tool call"
        if self.end_of_turn is None:
            return None
        try:
            with bounded(where):
                if self._first_left_out(turns, None, where):
                    return None
                return self._last_token(self.render(turns, None, False, where))
        except (Unusable, UserError):
            return None                                # the template knows no tool calls

    def _last_token(self, rendered):
        """The special token with which a text ends, white space aside, or None."""
        rendered = rendered.rstrip()
        *_, last = [None, *self.control.finditer(rendered)]
        return last[0] if last and last.end() == len(rendered) else None


def _apply(tokenizer, messages, tools, generation_prompt, where):
    import jinja2
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
                                             add_generation_prompt=generation_prompt)
    except jinja2.TemplateError as error:
        raise Unusable(f"the chat template refuses it: {said_first(error)}") from None
    except MemoryError:                    # `bounded` says so
        raise
    except Exception as error:  # noqa: BLE001  a template is a program
        said = f"{type(error).__name__}: {' '.join(str(error)[:400].split())[:200]}"
        raise UserError(f"the chat template fails ({said}) in {where}; "
                        "fix: give another chat_template") from error


# ---- tools ----

def _named(call, name):
    """A tool, or a call of one, under another name."""
    return call | {"function": call["function"] | {"name": name}}


def _in_python(turns, rendered):
    """Whether a call's arguments stand in the text as Python writes them, which is not JSON."""
    for turn in turns:
        for call in turn.get("tool_calls", []):
            arguments = call["function"]["arguments"]
            if isinstance(arguments, dict) and arguments and str(arguments) in rendered:
                return True
    return False


def _with_json(call):
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


# ---- thoughts ----

def _opened(context):
    """The opening of thoughts with which a context ends, such as "<think>\\n", or ""."""
    found = re.search(r"<think>\s*\Z", context)
    return found[0] if found else ""


def _behind(opened, said):
    """What follows in `said`, a text that starts with <think>, once `opened` is written."""
    if not opened:
        return said
    return said.removeprefix("<think>").removeprefix(opened.removeprefix("<think>"))


def _with_thoughts(turn):
    """The turn's text from <think> on, or None if it has no thoughts."""
    if turn.get("reasoning_content"):
        return f"<think>\n{turn['reasoning_content'].strip()}\n</think>\n\n{turn['content'].lstrip()}"
    text = turn["content"].lstrip()
    if text.startswith("<think>"):
        return text
    return f"<think>\n{text}" if "</think>" in text else None


def _thoughts_apart(turn):
    """The turn with the thoughts of its content as reasoning_content, if it has any there."""
    thoughts, end, answer = turn["content"].lstrip().partition("</think>")
    if not end or not thoughts.startswith("<think>") or turn.get("reasoning_content"):
        return turn
    return turn | {"reasoning_content": thoughts.removeprefix("<think>").strip(), "content": answer.lstrip()}


def _check_thoughts(turn, rendered, where):
    """UserError where the turn's thoughts are not in the text that is trained."""
    *thoughts, _ = re.split("</?think>", turn["content"])
    named = [("thoughts", text) for text in thoughts]
    named.append(("reasoning_content", turn.get("reasoning_content", "")))
    found = "".join(rendered.split())
    for name, text in named:
        if "".join(text.split()) not in found:
            raise UserError(f"the chat template leaves out the {name} of the assistant's turn "
                            f"({text.strip()[:40]!r}) in {where}; "
                            "fix: give a chat_template that renders them, or remove them")


# ---- tokens ----

def _control_tokens(tokenizer):
    """The pattern that finds a special token in a text."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return any_of({*special, *tokenizer.all_special_tokens})


def any_of(names):
    """The pattern that finds one of the names in a text, the longest of those that begin at one place."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")      # (?!) matches nothing
