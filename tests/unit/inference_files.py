"""Tiny but real model files for the inference tests: a GGUF, a safetensors folder, a tokenizer, a web server."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf
import numpy as np

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WIDTH, HEADS, KV_HEADS, FEED, LAYERS, CONTEXT = 64, 4, 2, 96, 2, 128
MERGES = ["Ġ t", "h e", "Ċ Ċ", "Ġ Ġ", "i n", "a b"]


def byte_alphabet() -> list[str]:
    """The 256 characters in which byte-level BPE writes bytes: printable ones as they are, the rest from U+0100."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + number) for number in range(len(rest))]


def vocabulary() -> list[str]:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return specials + byte_alphabet() + [merge.replace(" ", "") for merge in MERGES]


def write_gguf(path: Path, *, seed: int = 0, template: str = CHATML, pre: str = "smollm") -> dict[str, np.ndarray]:
    """Write a two-layer Llama with Q4_1 matrices; return the weights as the quantised file stores them."""
    draw = np.random.default_rng(seed)
    tokens = vocabulary()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(template)
    stored: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        values = draw.normal(0, 0.05, (rows, columns)).astype(np.float32)
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        stored[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_1)

    def vector(name: str) -> None:
        values = (1 + draw.normal(0, 0.1, WIDTH)).astype(np.float32)
        writer.add_tensor(name, values)
        stored[name] = values

    matrix("token_embd.weight", len(tokens), WIDTH)
    vector("output_norm.weight")
    narrow = WIDTH * KV_HEADS // HEADS
    for layer in range(LAYERS):
        vector(f"blk.{layer}.attn_norm.weight")
        vector(f"blk.{layer}.ffn_norm.weight")
        for name, rows in (("attn_q", WIDTH), ("attn_k", narrow), ("attn_v", narrow), ("attn_output", WIDTH)):
            matrix(f"blk.{layer}.{name}.weight", rows, WIDTH)
        matrix(f"blk.{layer}.ffn_gate.weight", FEED, WIDTH)
        matrix(f"blk.{layer}.ffn_up.weight", FEED, WIDTH)
        matrix(f"blk.{layer}.ffn_down.weight", WIDTH, FEED)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def write_tokenizer(folder: Path, template: str | None = CHATML, **changes: Any) -> Path:
    """Write a byte-level tokenizer with a chat template, as a checkpoint would carry it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate(vocabulary())}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in vocabulary()[:3]])
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **changes}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def serve(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Run a web server on the loopback address whose every GET and POST is handled by `answer`; yield its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a client that hung up
                answer(self)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Keep the test output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
