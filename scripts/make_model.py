"""Makes a tiny Qwen3 with random weights, its own tokenizer and chat template.

Two layers, 1.3 MB: an engine serves it in a few milliseconds per request on one
core. What it says has no meaning, but all of serving is there: a byte-level BPE
tokenizer whose tokens cut through UTF-8 sequences, special tokens, a chat template
with tools and thinking, defaults in generation_config.json, answers that end by
themselves. The same arguments give the same files, byte for byte.

With `--experts N` its layers are mixtures of N experts, of which each token takes two.

usage: make_model.py OUT [--experts N]        (needs numpy, tokenizers)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# Changes whenever the output does, so that an old model is made anew.
REVISION = 3

SEED = 20

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

# Single tokens that are part of the visible text, as in Qwen3's tokenizer.
MARKERS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

SIZES = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=64, max_position_embeddings=8192)

# Words of the training text. The rows after the first bring merges inside and
# across multi-byte characters, digits and code.
WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government number
night point home water room mother area money story fact month lot right study book eye job word
the of and a to in is you that it he was for on are as with his they at be this have from or one
quick brown fox jumps over lazy dog while seven wizards vex jolly robots near frozen rivers hello
prefill decode cache router worker token block event engine stream batch queue prefix weather city
naïve café über straße señor déjà façade Ærø žluťoučký kůň Привет мир Ελληνικά καλημέρα
你好 世界 机器 学习 日本語 東京 こんにちは 한국어 안녕 שלום مرحبا नमस्ते 🙂 🚀 🎉 👩‍🔬 👍🏽 🇩🇪
0 1 2 10 42 100 255 1024 3.14 {"name": "value"}, [true, false, null] fn main() {} def f(x): return x
""".split()

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
{{- 'Functions that may be called:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\nTo call one, write its name and arguments as JSON between <tool_call> and </tool_call>.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'system' and loop.first and tools %}{%- continue %}{%- endif %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and message.reasoning_content is string %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif %}
{%- if message.content is string %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function if call.function else call %}
{{- '\\n<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments if function.arguments is string else (function.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""


def train_tokenizer() -> Tokenizer:
    rng = numpy.random.default_rng(SEED)
    text = [
        " ".join(rng.choice(WORDS, size=12)).capitalize() + rng.choice([".", "!", "?", ",\n", ";\t"])
        for _ in range(4000)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=SPECIAL_TOKENS,
        # The default is a set, in an order that changes from run to run.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens([AddedToken(marker, normalized=False, special=False) for marker in MARKERS])
    return tokenizer


def weights(vocabulary: int, eos: int, experts: int) -> dict[str, numpy.ndarray]:
    rng = numpy.random.default_rng(SEED)
    hidden, inner, head = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["head_dim"]
    queries, keys = SIZES["num_attention_heads"] * head, SIZES["num_key_value_heads"] * head

    def matrix(rows: int, columns: int) -> numpy.ndarray:
        return rng.normal(0.0, 0.2, (rows, columns)).astype(numpy.float32)

    def feed_forward() -> dict[str, numpy.ndarray]:
        if not experts:
            return {f"mlp.{name}": tensor for name, tensor in expert().items()}
        gate = {"mlp.gate": matrix(experts, hidden)}
        each = ({f"mlp.experts.{index}.{name}": tensor for name, tensor in expert().items()} for index in range(experts))
        return gate | {name: tensor for tensors in each for name, tensor in tensors.items()}

    def expert() -> dict[str, numpy.ndarray]:
        return {"gate_proj": matrix(inner, hidden), "up_proj": matrix(inner, hidden), "down_proj": matrix(hidden, inner)}

    ones = lambda size: numpy.ones(size, numpy.float32)  # noqa: E731
    tensors = {"model.embed_tokens.weight": matrix(vocabulary, hidden)}
    for layer in range(SIZES["num_hidden_layers"]):
        tensors |= {
            f"model.layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "input_layernorm": ones(hidden),
                "self_attn.q_proj": matrix(queries, hidden),
                "self_attn.k_proj": matrix(keys, hidden),
                "self_attn.v_proj": matrix(keys, hidden),
                "self_attn.o_proj": matrix(hidden, queries),
                "self_attn.q_norm": ones(head),
                "self_attn.k_norm": ones(head),
                "post_attention_layernorm": ones(hidden),
                **feed_forward(),
            }.items()
        }
    head_matrix = matrix(vocabulary, hidden)
    # A louder end-of-sequence row: some answers end by themselves after tens of tokens.
    head_matrix[eos] *= 1.5
    return tensors | {"model.norm.weight": ones(hidden), "lm_head.weight": head_matrix}


def configuration(vocabulary: int, eos: int, pad: int, experts: int) -> dict:
    kind = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3")
    if experts:
        kind = dict(
            architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_experts=experts, num_experts_per_tok=2,
            moe_intermediate_size=SIZES["intermediate_size"], norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        )
    return dict(
        **kind, vocab_size=vocabulary, **SIZES,
        hidden_act="silu", rms_norm_eps=1e-6, attention_bias=False, attention_dropout=0.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False, use_sliding_window=False, dtype="bfloat16",
        bos_token_id=None, eos_token_id=eos, pad_token_id=pad,
    )


def make(out: Path, experts: int) -> None:
    tokenizer = train_tokenizer()
    eos, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    # Some ids have no token, as in most real models.
    vocabulary = -(-tokenizer.get_vocab_size() // 64) * 64

    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_json(out / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        model_max_length=SIZES["max_position_embeddings"], clean_up_tokenization_spaces=False,
    ))
    write_json(out / "generation_config.json", dict(
        do_sample=True, temperature=0.7, top_k=20, top_p=0.8, eos_token_id=[eos, pad], pad_token_id=pad,
    ))
    write_json(out / "config.json", configuration(vocabulary, eos, pad, experts))
    save_bfloat16(weights(vocabulary, eos, experts), out / "model.safetensors")


def save_bfloat16(tensors: dict[str, numpy.ndarray], path: Path) -> None:
    """Writes float32 tensors as bfloat16, which numpy has no type for: the upper half of each number.

    A safetensors file is the length of a JSON header, the header, and the tensors.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        start = len(data)
        data += (tensor.view(numpy.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=0)
    arguments = parser.parse_args()
    out = arguments.out
    stamp = out / "revision"
    if stamp.exists() and stamp.read_text() == str(REVISION):
        return
    make(out, arguments.experts)
    stamp.write_text(str(REVISION))


if __name__ == "__main__":
    main()
