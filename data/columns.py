"""The names of the columns that a row may have; see `data.formats` for what is read of them."""
import itertools

WHOLE = ("messages", "conversations", "conversation")            # one column with the whole conversation
REPLIES = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("problem", "solution"),
    ("instruction", "output"),
    ("query", "response"),
    ("prompt", "extra_info.answer"),          # verl's
)
PAIRS = (
    ("prompt", "chosen_response", "rejected_response"),
    ("prompt", "chosen", "rejected"),
    ("conversations", "chosen", "rejected"),
    ("instruction", "chosen", "rejected"),
    ("question", "chosen", "rejected"),
    ("query", "chosen", "rejected"),
    ("query", "response", "rejected_response"),
    ("question", "response_j", "response_k"),
    ("messages", "rejected_response"),
    ("messages", "rejected_messages"),
    ("", "chosen", "rejected"),               # "": no prompt column
)
PROMPTS = (*WHOLE, "prompt", "question", "problem", "Problem", "instruction", "query", "chosen")
QUESTIONS = ("question", "problem", "Problem")
LABELS = ("label", "kto_tag")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
KNOWN = {*itertools.chain(*REPLIES, *PAIRS), *PROMPTS, *LABELS, *MEDIA, "text", "system", "tools", "history",
         "input", "margin", "extra_info", "reward_model"}      # a number in any other column is an extra
