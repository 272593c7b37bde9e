#!/usr/bin/env python3
"""Writes crates/text/tests/golden: what transformers, tokenizers and vLLM answer, for the text crate to equal.

Needs an environment with vLLM (`.venv` after the set-up). Deterministic; run it again after a change of the pinned
versions and look at the difference:

    .venv/bin/python scripts/golden_text.py
"""

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import tokenizers
import transformers
import vllm
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers
from transformers import AutoTokenizer
from vllm.renderers.chat_utils import parse_chat_messages
from vllm.renderers.hf import _detect_content_format, safe_apply_chat_template
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.engine.logprobs import LogprobsProcessor

GOLDEN = Path(__file__).resolve().parent.parent / "crates/text/tests/golden"

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12:30, they'll be here in 1234567 seconds!",
    "def main(argument):\n    for i in range(10):\n        print(i)\n\n\treturn {'a': [1, 2.5]}\r\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Ça alors, où est l'hôtel ?",
    "Привет, мир! Как дела? 你好，世界。今日はいい天気ですね。 한국어 텍스트. مرحبا بالعالم",
    "Emoji: 😀 👩‍👩‍👧 🇩🇪 ✨ and symbols: ∑ ∞ ≠ … — “quotes”   spaces    many",
    "system user assistant tool What is the weather in Paris? You are a helpful assistant.",
]
WORDS = sorted({word for line in CORPUS for word in line.split(" ")}) + ["\n", "\n\n", " ", "  ", "\t"]

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level() -> Tokenizer:
    """In the style of Qwen: byte-level BPE, special tokens of which some are only added."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    plain = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|im|>"]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in plain])
    tokenizer.add_tokens([AddedToken("größe", normalized=True, special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def sentencepiece() -> Tokenizer:
    """In the style of Llama 2: BPE with byte fallback over normalized text."""
    alphabet = sorted({c for line in CORPUS[:3] for c in line.replace(" ", "▁")})
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:3], trainer)
    # The trainer made the byte tokens special; only the named ones are.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """Metaspace as pre-tokenizer, a space in front of the first piece only."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[:3], trainer)
    return tokenizer


CONFIGS = {
    "byte_level": dict(
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token=None,
        additional_special_tokens=["<|vision|>"],
        image_token="<|image|>",
    ),
    "sentencepiece": dict(
        bos_token={"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False},
        eos_token="</s>",
        unk_token="<unk>",
    ),
    "metaspace": dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
}


def write_models():
    for name, build in [("byte_level", byte_level), ("sentencepiece", sentencepiece), ("metaspace", metaspace)]:
        folder = GOLDEN / name
        folder.mkdir(parents=True)
        state = json.loads(build().to_str())
        (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False, separators=(",", ":")))
        config = dict(CONFIGS[name], tokenizer_class="PreTrainedTokenizerFast")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def random_text(rng: random.Random, specials: list[str]) -> str:
    pieces = []
    for _ in range(rng.randrange(12)):
        pieces.append(rng.choice(specials) if rng.random() < 0.25 else rng.choice(WORDS))
        if rng.random() < 0.5:
            pieces.append(" ")
    return "".join(pieces)


def encodings(tokenizer, specials: list[str], rng: random.Random) -> list:
    texts = ["", " ", "a", specials[0], specials[0] * 2, f" {specials[-1]} "]
    texts += [random_text(rng, specials) for _ in range(40)]
    return [
        dict(
            text=text,
            ids=tokenizer.encode(text, add_special_tokens=False),
            framed=tokenizer.encode(text, add_special_tokens=True),
        )
        for text in texts
    ]


def random_ids(rng: random.Random, tokenizer, specials: list[int], count: int) -> list[int]:
    """Ids of real text, with noise: single bytes, specials, ids without a token."""
    size = len(tokenizer)
    ids = []
    while len(ids) < count:
        kind = rng.random()
        if kind < 0.6:
            ids += tokenizer.encode(rng.choice(WORDS) + " ", add_special_tokens=False)
        elif kind < 0.75:
            ids.append(rng.choice(specials))
        elif kind < 0.98:
            ids.append(rng.randrange(min(300, size)))
        else:
            ids.append(size + rng.randrange(10))
    return ids[:count]


def decodings(tokenizer, specials: list[int], rng: random.Random) -> list:
    rows = []
    for _ in range(25):
        ids = random_ids(rng, tokenizer, specials, rng.randrange(1, 14))
        rows.append(
            dict(
                ids=ids,
                text=tokenizer.decode(ids),
                skipped=tokenizer.decode(ids, skip_special_tokens=True),
            )
        )
    return rows


def clean_prompt(rng, tokenizer, specials) -> list[int]:
    """A prompt that ends with a whole character; where it does not, vLLM repeats the prompt and we do not."""
    while True:
        prompt = random_ids(rng, tokenizer, specials, rng.randrange(1, 6))
        if not any(tokenizer.decode(prompt, skip_special_tokens=skip).endswith("�") for skip in (True, False)):
            return prompt


def streams(tokenizer, specials: list[int], rng: random.Random, count: int) -> list:
    rows = []
    for _ in range(count):
        ids = random_ids(rng, tokenizer, specials, rng.randrange(1, 30))
        prompt = clean_prompt(rng, tokenizer, specials)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        stops = []
        for _ in range(rng.choice([0, 1, 1, 2, 3])):
            if whole and rng.random() < 0.8:
                at = rng.randrange(len(whole))
                stops.append(whole[at : at + rng.randrange(1, 6)])
            else:
                stops.append(rng.choice(["never", "\n\n", "zz"]))
        stops = [stop for stop in stops if "�" not in stop]
        params = SimpleNamespace(
            stop=stops,
            min_tokens=rng.choice([0, 0, 3, 8]),
            include_stop_str_in_output=rng.random() < 0.4,
            skip_special_tokens=rng.random() < 0.6,
            spaces_between_special_tokens=rng.random() < 0.5,
        )
        request = SimpleNamespace(sampling_params=params, prompt_token_ids=prompt, request_id="golden")
        detokenizer = FastIncrementalDetokenizer(tokenizer, request)
        end = rng.choice(["stop_token", "other"])
        steps, rest = [], list(ids)
        while rest:
            take = rng.choice([1, 1, 1, 2, 4])
            delta, rest = rest[:take], rest[take:]
            ended = not rest
            before = len(detokenizer.output_token_ids)
            stop = detokenizer.update(list(delta), ended and end == "stop_token")
            text = detokenizer.get_next_output_text(ended or stop is not None, delta=True)
            kept = len(detokenizer.output_token_ids) - before
            steps.append(dict(tokens=delta, text=text, stop=stop, kept=kept))
            if stop is not None:
                break
        rows.append(dict(vars(params), prompt=prompt, end=end, steps=steps))
    return rows


def logprobs(tokenizer, specials: list[int], rng: random.Random) -> list:
    rows = []
    for _ in range(12):
        processor = LogprobsProcessor(
            tokenizer=tokenizer,
            logprobs=[],
            prompt_logprobs=None,
            cumulative_logprob=0.0,
            num_logprobs=2,
            num_prompt_logprobs=None,
        )
        positions = []
        for sampled in random_ids(rng, tokenizer, specials, 10):
            others = random_ids(rng, tokenizer, specials, 2)
            tokens = list(dict.fromkeys([sampled, *others]))
            size = len(tokenizer)
            tokens = [token for token in tokens if token < size] or [0]
            arrays = ([_Array(tokens)], [_Array([-1.0] * len(tokens))], [_Array(1)], None)
            processor._update_sample_logprobs(arrays)
            texts = {token: entry.decoded_token for token, entry in processor.logprobs[-1].items()}
            positions.append(dict(tokens=tokens, texts=[texts[token] for token in tokens]))
        rows.append(positions)
    return rows


class _Array:
    """Stands for a numpy array that is only turned into a list."""

    def __init__(self, values):
        self.values = values

    def tolist(self):
        return self.values


CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nYou may call these functions:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}"
    "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
    "{{bos_token}}{{ns.system_prompt}}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and 'tool_calls' in message %}{%- set ns.is_tool = false -%}"
    "{%- for tool in message['tool_calls']%}"
    "{%- if not ns.is_first %}{{'<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>'"
    " + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments']|tojson + '\\n' + '```'"
    " + '<｜tool▁call▁end｜>'}}{%- set ns.is_first = true -%}"
    "{%- else %}{{'\\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name']}}{%- endif %}"
    "{%- endfor %}{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- if message['role'] == 'assistant' and 'tool_calls' not in message %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}{%- endif %}"
    "{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}"
    "{%- if ns.is_output_first %}{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}"
    "{%- set ns.is_output_first = false %}{%- else %}{{'\\n<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}"
    "{%- endif %}{%- endif %}{%- endfor -%}"
    "{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}"
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)

PARTS = """\
{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}<|vision|>{% elif 'text' in content %}{{ content['text'] }}{{ content.cache_control | default('') }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

MACROS = """\
{%- macro show(parts, indent=2) -%}
    {%- if parts is string -%}{{ parts | indent(indent) }}
    {%- else -%}
        {%- for part in parts -%}{{ part.text | upper }}{%- if not loop.last %}|{% endif -%}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro type_of(value) -%}
    {%- if value is mapping -%}object{%- elif value is sequence and value is not string -%}list
    {%- elif value is boolean -%}bool{%- elif value is integer -%}int{%- elif value is number -%}float
    {%- elif value is none -%}none{%- else -%}str{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == 'developer' %}[dev]{% endif -%}
    [{{ message.role | capitalize }}] {{ show(message.content) }}
    {%- generation -%} {% endgeneration %}
    {%- if message.tool_calls -%}
        {%- for call in message.tool_calls %}
            {%- for name, value in call.function.arguments | dictsort %}
                {{- "\\n- %s (%s) = " | format(name, type_of(value)) ~ value }}
            {%- endfor %}
        {%- endfor -%}
    {%- endif -%}
    {%- if loop.index > 20 %}{% break %}{% endif -%}
    {{ "\\n" }}
{%- endfor -%}
{%- for document in documents or [] -%}
    Document {{ loop.index }} of {{ loop.length }}: {{ document.title | title }} - {{ document.text.replace("a", "4") }}
{% endfor -%}
{{ {"b": 1, "a": [true, none, 1.5, "é<>&'\\n"]} | tojson(sort_keys=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}
{{ [none, true, 1.0, "x", ["y"], {"k": "v"}] }} {{ 7 // 2 }} {{ 7 / 2 }} {{ 2 ** 10 }} {{ -7 % 3 }} {{ "ab" * 2 }} {{ 1e20 }} {{ 1.5e-7 }}
{{ ["b", "a"] | sort | join("+") }} {{ "a,b,c".split(",")[-1] }} {{ "x".join(["1", "2"]) }} {{ "abc"[::-1] }} {{ "abc"[1:] }}
{{ "  pad ".strip() }}|{{ "prefix-body".removeprefix("prefix-") }}|{{ "a.b.c".rsplit(".", 1)[0] }}|{{ "k=v".partition("=")[2] }}
{{ messages | map(attribute="role") | unique | list }} {{ messages | selectattr("role", "equalto", "user") | list | length }}
{{ messages | rejectattr("role", "in", ["user"]) | list | length }} {{ undefined_thing is defined }} [{{ undefined_thing }}]
{%- set ns = namespace(total=0) -%}
{%- for n in range(5) if n is odd -%}{%- set ns.total = ns.total + n -%}{%- endfor %} {{ ns.total }}
{{- "\\n" ~ (reasoning_effort | default("none", true)) }} {{ loop is defined }} {{ "%05.1f" | format(3.14159) }}
{{ {"a": 1}.get("b", "dflt") }} {{ {"a": 1}.items() | list }} {{ dict(x=1, y="z") }}
{% if add_generation_prompt %}[Assistant]{% endif %}"""

TEMPLATES = dict(chatml=CHATML, llama3=LLAMA3, mistral=MISTRAL, deepseek=DEEPSEEK, parts=PARTS, macros=MACROS)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a place, e.g. \"Köln\" <now>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object", "properties": {}}}},
]


def call(identifier, name, arguments):
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


U, A, S = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant", "system"))

CONVERSATIONS = {
    "one": [U("What is the weather in Paris?")],
    "system": [S("  Be brief. \n"), U("Hi"), A("Hello!\n"), U("Bye")],
    "tools": [
        U("Weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call("call12345", "get_weather", '{"city": "Köln", "days": 2, "f": 1.0}')]},
        {"role": "tool", "tool_call_id": "call12345", "content": [{"type": "text", "text": "sunny"}, {"type": "text", "text": "21"}]},
    ],
    "two_calls": [
        U("Weather?"),
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call("a", "now", ""), call("b", "get_weather", '{"city": ["x", null, true], "n": {"k": 1}}')]},
        {"role": "tool", "tool_call_id": "a", "content": "12:00"},
        {"role": "tool", "tool_call_id": "b", "content": "rain"},
        A("It rains."),
        U("Thanks"),
    ],
    "bad_arguments": [U("x"), {"role": "assistant", "content": "", "tool_calls": [call("a", "now", "{not json"), ]}, U("y")],
    "list_arguments": [U("x"), {"role": "assistant", "content": "", "tool_calls": [call("a", "now", "[1]")]}, U("y")],
    "no_calls": [U("x"), {"role": "assistant", "content": "fine", "tool_calls": []}, U("y")],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two", "cache_control": "c"}, "three"]}],
    "reasoning": [U("2+2?"), {"role": "assistant", "content": "4", "reasoning": "Easy."}, U("3+3?"), A("<think>\nhm\n</think>\n\n6")],
    "developer": [{"role": "developer", "content": "Rules."}, U("Hi"), S("More."), U("Go")],
    "roles": [U("a"), U("b")],
    "named": [{"role": "user", "content": "hi", "name": "Bob", "unknown_field": 1}],
    "unicode": [U("\u2028 “é” 😀\t{{ 7 }} {% raw %}"), A("ok  \n"), U("")],
}

OPTIONS = [
    dict(add_generation_prompt=True),
    dict(add_generation_prompt=True, tools=True, enable_thinking=False),
    dict(add_generation_prompt=False, continue_final_message=True),
    dict(add_generation_prompt=False, documents=[{"title": "the title", "text": "a cat"}], custom_tools=TOOLS[:1], date_string="26 Jul 2024", reasoning_effort="high"),
]

# What `strftime_now` is to show, as seconds since the epoch, and the same without a time zone.
NOW = 1_767_225_600
DATE = "2026-01-01T00:00:00"


def renderings(tokenizer) -> list:
    import datetime

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(DATE)

    config = SimpleNamespace(
        multimodal_config=None,
        enable_prompt_embeds=False,
        tokenizer_revision=None,
        revision=None,
        code_revision=None,
        tokenizer="x",
        model="x",
        trust_remote_code=False,
        hf_config=SimpleNamespace(model_type="none"),
        is_multimodal_model=False,
    )
    rows = []
    patches = [
        mock.patch("transformers.utils.chat_template_utils.datetime", Clock),
        mock.patch("vllm.renderers.hf._try_get_processor_chat_template", lambda *_, **__: None),
    ]
    for patch in patches:
        patch.start()
    for name, template in TEMPLATES.items():
        detected = _detect_content_format(template, default="string")
        for conversation, messages in CONVERSATIONS.items():
            for options in OPTIONS:
                options = dict(options)
                tools = TOOLS if options.pop("tools", False) else None
                row = dict(template=name, conversation=conversation, tools=tools is not None, options=options)
                row["format"] = detected
                try:
                    prepared, _, _ = parse_chat_messages(json.loads(json.dumps(messages)), config, detected)
                    kwargs = dict(options)
                    row["text"] = safe_apply_chat_template(
                        config, tokenizer, prepared, tools=tools, chat_template=template, tokenize=False, **kwargs
                    )
                except Exception as error:
                    row["error"] = str(error)[:100]
                rows.append(row)
    for patch in patches:
        patch.stop()
    return rows


def write(name: str, value):
    (GOLDEN / name).write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")


def main():
    shutil.rmtree(GOLDEN, ignore_errors=True)
    write_models()
    rng = random.Random(20260101)
    tables = {}
    for name in CONFIGS:
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / name)
        added = tokenizer.get_added_vocab()
        specials, ids = sorted(added), sorted(added.values())
        tables[name] = dict(
            special_tokens_map={k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
            eos=tokenizer.eos_token_id,
            bos=tokenizer.bos_token_id,
            pad=tokenizer.pad_token_id,
            size=len(tokenizer),
            encodings=encodings(tokenizer, specials, rng),
            decodings=decodings(tokenizer, ids, rng),
            streams=streams(tokenizer, ids, rng, 50 if name == "byte_level" else 25),
            logprobs=logprobs(tokenizer, ids, rng),
        )
    write("tokenizers.json", tables)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "sentencepiece")
    write("templates.json", dict(
        now=NOW, templates=TEMPLATES, tools=TOOLS, conversations=CONVERSATIONS, rows=renderings(tokenizer)
    ))
    versions = dict(
        python=sys.version.split()[0],
        tokenizers=tokenizers.__version__,
        transformers=transformers.__version__,
        vllm=vllm.__version__,
    )
    write("versions.json", versions)
    total = sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file())
    print(f"{GOLDEN}: {total / 1024:.0f} KiB, {versions}")


if __name__ == "__main__":
    main()
