#!/usr/bin/env python3
"""Reads a .sinf file with the standard library and NumPy, written from format-spec/FORMAT.md alone.

    python3 read_sinf.py MODEL.sinf         prints a JSON summary; exits with 1 and a message when a rule is broken

As a module: `Sinf(path)` has `config`, `tensors[(kind, layer)]` as NumPy arrays (bf16 as float32) and `predictors`
(shares that were not measured are None).
Checks structure, sizes, padding and sign words; checksums too when the packages xxhash and blake3 are installed.
The compressed records (tokenizer, provenance) are left as bytes.
"""
import json
import math
import struct
import sys

import numpy as np

MODEL_FIELDS = ("hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
                "vocab_size max_position_embeddings").split()
KINDS = {1: "embedding", 2: "final_norm", 3: "lm_head", 16: "attn_norm", 17: "w_q", 18: "w_k", 19: "w_v", 20: "w_o",
         32: "mlp_norm", 33: "gate_signs", 34: "w_gate", 35: "w_up", 36: "w_down_t", 37: "gate_limits",
         38: "gate_planes", 39: "gate_offsets", 40: "gate_fc1", 41: "gate_fc2",
         42: "residual_signs", 43: "residual_scales", 64: "predictors", 65: "calibration_curves", 66: "budget_curve", 80: "tokenizer", 81: "provenance"}
DTYPES = {1: np.dtype("u1"), 2: np.dtype("<u4"), 16: np.dtype("<f4"), 17: np.dtype("<f2"), 18: np.dtype("<u2")}
ACTIVATIONS = {1: "relu", 2: "fatrelu", 3: "silu"}
PREDICTORS = {0: "off", 1: "sign", 2: "sign_per_row", 3: "sign_x8", 4: "low_rank", 5: "w2", 6: "w3",
              7: "low_rank_relu", 8: "low_rank_sign"}
SHARES = ("rows_active", "rows_kept", "recall", "missed_energy")
NONE = 0xFFFFFFFF


def expect(condition, message):
    if not condition:
        sys.exit(f"error: {message}")


def align_up(offset, alignment):
    return -(-offset // alignment) * alignment


class Sinf:
    def __init__(self, path):
        self.data = data = np.memmap(path, dtype=np.uint8, mode="r")
        expect(len(data) >= 256 and bytes(data[:8]) == b"\x89SINF\r\n\x1a", "not a .sinf file")
        header = bytes(data[:256])
        major, self.minor, endianness, header_len, alignment, total_len, table, n_sections, flags = \
            struct.unpack_from("<HHIIIQQII", header, 8)
        expect((major, endianness, header_len) == (1, 0x01020304, 256), "not version 1")
        expect(64 <= alignment <= 65536 and alignment & (alignment - 1) == 0, f"an alignment of {alignment}")
        expect(total_len == len(data), f"{total_len} bytes are stated, {len(data)} found")
        expect(table + 96 * n_sections == len(data), "the section table does not end with the file")
        self.config = config = dict(zip(MODEL_FIELDS, struct.unpack_from("<8I", header, 48)))
        theta, factor, scaling, eps, activation, threshold = struct.unpack_from("<ddIfIf", header, 80)
        tokens = struct.unpack_from("<5I", header, 112)
        expect(activation in ACTIVATIONS and scaling in (0, 1), "unknown activation or RoPE scaling")
        expect(not any(header[132:216]), "a reserved byte of the header is not zero")
        config.update(rope_theta=theta, rope_scaling_factor=factor if scaling else None, rms_norm_eps=eps,
                      activation=ACTIVATIONS[activation], activation_threshold=threshold,
                      tie_word_embeddings=bool(flags & 1), bos_token_id=None if tokens[0] == NONE else tokens[0],
                      eos_token_ids=[token for token in tokens[1:] if token != NONE])
        self.digest, self.header_checksum = header[216:248], struct.unpack_from("<Q", header, 248)[0]
        self.read_sections(table, n_sections, alignment)
        self.predictors = [self.record(bytes(row)) for row in self.tensors["predictors", None]]
        self.check_signs()
        self.check_factors()

    def read_sections(self, table, n_sections, alignment):
        self.tensors, self.checksums, end = {}, {}, 256
        for index in range(n_sections):
            row = bytes(self.data[table + 96 * index:][:96])
            kind, layer, dtype, encoding, flags, n_dims = struct.unpack_from("<6I", row)
            dims = struct.unpack_from("<4Q", row, 24)[:n_dims]
            offset, length, xxh3 = struct.unpack_from("<3Q", row, 56)
            expect(offset == align_up(end, alignment), f"section {index} starts at {offset}")
            expect(not self.data[end:offset].any(), f"the padding before section {index} is not zero")
            end = offset + length
            expect(end <= table, f"section {index} reaches into the table")
            self.checksums[index] = (offset, length, xxh3)
            if kind not in KINDS:
                expect(flags & 1 == 0, f"section {index} is required and of unknown kind {kind}")
                continue
            expect(dtype in DTYPES, f"section {index} has dtype {dtype}")
            n_bytes = math.prod(dims) * DTYPES[dtype].itemsize
            expect(length == n_bytes, f"section {index} has length {length}, not {n_bytes}")
            expect(encoding == (1 if kind in (80, 81) else 0), f"section {index} has encoding {encoding}")
            tensor = self.data[offset:end].view(DTYPES[dtype]).reshape(dims)
            if dtype == 18:  # The upper half of a binary32.
                tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
            key = (KINDS[kind], None if layer == NONE else layer)
            expect(key not in self.tensors, f"section {index} repeats {key}")
            self.tensors[key] = tensor
        expect(table == align_up(end, alignment) and not self.data[end:table].any(), "bytes before the table")

    @staticmethod
    def record(row):
        kind, limit, alpha, *shares, n_tokens, threshold = struct.unpack_from("<IIfffffIf", row)
        expect(kind in PREDICTORS and not any(row[36:]), f"predictor kind {kind} or its reserved bytes")
        shares = {name: None if math.isnan(share) else share for name, share in zip(SHARES, shares)}
        return dict(kind=PREDICTORS[kind], limit=limit, alpha=alpha, **shares, n_tokens=n_tokens, threshold=threshold)

    def check_signs(self):
        """Packs the signs of w_gate again, 32 columns to a word, and compares."""
        for (kind, layer), words in self.tensors.items():
            if kind == "gate_signs":
                negative = self.tensors["w_gate", layer] < 0
                negative = np.pad(negative, ((0, 0), (0, -negative.shape[1] % 32)))
                packed = np.packbits(negative, axis=1, bitorder="little").view("<u4")
                expect(np.array_equal(packed, words), f"sign words of layer {layer} are not the signs of w_gate")

    def check_factors(self):
        """The factors of low rank are there where a predictor reads them, and fit each other."""
        d, f = self.config["hidden_size"], self.config["intermediate_size"]
        for layer, record in enumerate(self.predictors):
            fc1, fc2 = (self.tensors.get((kind, layer)) for kind in ("gate_fc1", "gate_fc2"))
            if record["kind"].startswith("low_rank"):
                expect(fc1 is not None and fc2 is not None, f"layer {layer} lacks a factor of low rank")
                expect(fc1.shape[0] <= d and fc1.shape[1] == d and fc2.shape == (f, fc1.shape[0]),
                       f"the factors of layer {layer} do not fit")
            else:
                expect(fc1 is None and fc2 is None, f"layer {layer} has a factor that its predictor does not read")
            signs, scales = (self.tensors.get((kind, layer)) for kind in ("residual_signs", "residual_scales"))
            is_read = record["kind"] == "low_rank_sign"
            expect((signs is not None) == is_read and (scales is not None) == is_read,
                   f"layer {layer} and its residual signs do not fit")
            if is_read:
                expect(signs.shape == (f, -(-d // 32)) and scales.shape == (f,) and np.isfinite(scales).all(),
                       f"the residual signs of layer {layer} do not fit")

    def check_sums(self):
        """Names of what was checked; neither hash is in the standard library."""
        checked = []
        try:
            import xxhash
            expect(xxhash.xxh3_64_intdigest(bytes(self.data[:248])) == self.header_checksum, "header checksum")
            for index, (offset, length, xxh3) in self.checksums.items():
                expect(xxhash.xxh3_64_intdigest(self.data[offset:offset + length]) == xxh3, f"XXH3 of section {index}")
            checked.append("xxh3")
        except ImportError:
            pass
        try:
            import blake3
            expect(blake3.blake3(self.data[256:]).update(self.data[:216]).digest() == self.digest, "BLAKE3 of the file")
            checked.append("blake3")
        except ImportError:
            pass
        return checked


def summary(sinf):
    tensors = [dict(kind=kind, layer=layer, shape=list(tensor.shape), sum=float(np.nansum(tensor, dtype=np.float64)))
               for (kind, layer), tensor in sinf.tensors.items()]
    predictors = [dict(record, alpha=str(record["alpha"]), threshold=str(record["threshold"])) for record in sinf.predictors]  # JSON has no infinity.
    return dict(config=sinf.config, predictors=predictors, tensors=tensors, checked=sinf.check_sums())


if __name__ == "__main__":
    expect(len(sys.argv) == 2, "usage: read_sinf.py MODEL.sinf")
    print(json.dumps(summary(Sinf(sys.argv[1]))))
