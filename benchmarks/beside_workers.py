"""The two sides of beside_huggingface.py, a process each that does what it is told, line by line.

usage: python benchmarks/beside_workers.py ours|theirs FOLDER BATCH.npz THREADS

Reads a JSON object a line, {"do": "train" | "greedy" | "beam", "calls": 3}, and answers with one:
seconds by the clock and of CPU of each call, and what came out.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

NEW_TOKENS = 64
BEAMS = 4
ADAMW = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
EOS = 1  # never written here: all sequences are NEW_TOKENS long


def seconds() -> tuple[float, float]:
    """By the clock, and of CPU in all threads."""
    return time.monotonic(), time.process_time()


def since(before: tuple[float, float]) -> tuple[float, float]:
    """Seconds since `before`."""
    now = seconds()
    return now[0] - before[0], now[1] - before[1]


class Ours:
    """The train step that `vishwam train` compiles, and our decoding."""

    def __init__(self, folder: str, batch: dict[str, np.ndarray], threads: int) -> None:
        import jax
        from etils import epath

        from vishwam_t5x.checkpointing.convert.huggingface import open_huggingface
        from vishwam_t5x.checkpointing.sources import Request
        from vishwam_t5x.core.trees import unflatten_names
        from vishwam_t5x.models import config as configs
        from vishwam_t5x.models.encoder_decoder import EncoderDecoder

        del threads  # as many as the process may use cores; the parent sees to that
        source = open_huggingface(epath.Path(folder))
        assert source is not None
        network = source.network
        sizes = {name: getattr(network, name) for name in (
            "emb_dim", "num_heads", "head_dim", "mlp_dim", "num_encoder_layers",
            "num_decoder_layers", "mlp_activations")}
        text = {"vocab_size": network.vocab_size, "modality_embedding": False}
        self.model = EncoderDecoder(configs.EncoderDecoderConfig(
            **sizes, qk_norm=False, scale_attention_logits=False,
            position=configs.RelativePositions(), inputs=(configs.TextInput(**text),),
            targets=(configs.TextOutput(
                **text, logits_via_embedding=network.logits_via_embedding),)))
        host = source.read({name: Request(np.dtype("float32"), None) for name in source.leaves})
        self.params = jax.device_put(unflatten_names(host))
        self.batch = batch
        self.compile_seconds: dict[str, tuple[float, float]] = {}
        self._calls: dict[str, Callable[[], Any]] = {}

    def call(self, what: str) -> Any:
        if what not in self._calls:
            before = seconds()
            self._calls[what] = self._train() if what == "train" else self._decode(what)
            self.compile_seconds[what] = since(before)
        return self._calls[what]()

    def _train(self) -> Callable[[], float]:
        import jax

        from vishwam_t5x.core.batch import BatchSpec
        from vishwam_t5x.objectives.losses import LossConfig
        from vishwam_t5x.parallelism import mesh as mesh_lib
        from vishwam_t5x.parallelism.axis_rules import LogicalAxisRules
        from vishwam_t5x.training import optimizers, setup, step

        inputs, targets = self.batch["inputs"], self.batch["targets"]
        spec = BatchSpec(len(inputs), inputs.shape[1], targets.shape[1],
                         {"text": inputs.shape[1]}, {"text": targets.shape[1]}, packed=False)
        optimizer = optimizers.AdamW(
            learning_rate=ADAMW["lr"], b1=ADAMW["betas"][0], b2=ADAMW["betas"][1],
            eps=ADAMW["eps"], weight_decay=ADAMW["weight_decay"])
        parts = setup.Parts(self.model, optimizer, mesh_lib.make_mesh(mesh_lib.MeshConfig()),
                            LogicalAxisRules(), step.StepConfig(loss=LossConfig(z_loss=0.0)),
                            spec)
        factory, shardings = parts.factory(), parts.batch_shardings()
        compiled = parts.compile(factory, shardings)
        self.temporaries = compiled.memory_analysis().temp_size_in_bytes
        arrays = {}
        for name, found in spec.arrays().items():
            side, _, field = name.split("/")
            tokens = inputs if side == "inputs" else targets
            arrays[name] = {
                "tokens": tokens, "targets": tokens, "inputs": shifted(tokens),
                "pos_ids": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)}.get(
                    field, np.ones_like(tokens)).astype(found.dtype)
        on_device = jax.device_put(arrays, shardings)
        state = [factory.with_params(self.params).on_device()]
        self.params = None  # as in training: the state has the only copy

        def take() -> float:
            state[0], metrics = compiled(state[0], on_device)
            return float(metrics["loss"])

        return take

    def _decode(self, what: str) -> Callable[[], list]:
        import jax
        import jax.numpy as jnp

        from vishwam_t5x.models.beam_search import beam_search
        from vishwam_t5x.models.decoding import greedy

        model, rows = self.model, len(self.batch["inputs"])

        def forbid_end(logits: jax.Array, position: jax.Array) -> jax.Array:
            return logits.at[:, EOS].set(-jnp.inf)

        def decode(params: Any, tokens: jax.Array) -> jax.Array:
            variables = {"params": params}

            def step(last: jax.Array, cache: Any) -> Any:
                return model.apply(variables, last, cache, "text", method="decode_step")

            encoded = model.apply(variables, {"inputs/text/tokens": tokens}, method="encode")
            cache = model.apply(variables, encoded, NEW_TOKENS, 1 if what == "greedy" else BEAMS,
                                method="init_cache")
            settings = {"batch_size": rows, "max_length": NEW_TOKENS, "logits_hook": forbid_end}
            if what == "greedy":
                return greedy(step, cache, **settings).best
            return beam_search(step, cache, lambda cache, rows: cache.reorder(rows), **settings,
                               num_beams=BEAMS, alpha=0.0).best

        program = jax.jit(decode).lower(self.params, self.batch["inputs"]).compile()
        return lambda: np.asarray(program(self.params, self.batch["inputs"])).tolist()


class Theirs:
    """Hugging Face's T5 in eager PyTorch, its fused AdamW and `generate`."""

    def __init__(self, folder: str, batch: dict[str, np.ndarray], threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.logging.set_verbosity_error()
        self.torch = torch
        self.model = transformers.T5ForConditionalGeneration.from_pretrained(
            folder, dropout_rate=0.0, attn_implementation="eager")
        self.inputs, self.targets = (torch.tensor(batch[name], dtype=torch.long)
                                     for name in ("inputs", "targets"))
        self.optimizer = None
        self.compile_seconds: dict[str, tuple[float, float]] = {}
        self.temporaries = 0

    def call(self, what: str) -> Any:
        if what == "train":
            return self._step()
        self.model.eval()
        with self.torch.no_grad():
            found = self.model.generate(
                self.inputs, attention_mask=self.torch.ones_like(self.inputs), do_sample=False,
                num_beams=1 if what == "greedy" else BEAMS, max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS, length_penalty=0.0, decoder_start_token_id=0)
        return found[:, 1:].tolist()

    def _step(self) -> float:
        if self.optimizer is None:
            self.optimizer = self.torch.optim.AdamW(self.model.parameters(), **ADAMW, fused=True)
        self.model.train()
        loss = self.model(input_ids=self.inputs, labels=self.targets,
                          attention_mask=self.torch.ones_like(self.inputs)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def shifted(tokens: np.ndarray) -> np.ndarray:
    """Decoder inputs: the targets one later, 0 first."""
    return np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]


def main() -> None:
    side, folder, batch, threads = sys.argv[1:]
    with np.load(batch) as file:
        arrays = dict(file)
    worker: Any = {"ours": Ours, "theirs": Theirs}[side](folder, arrays, int(threads))
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {"wall": [], "cpu": [], "out": []}
        for _ in range(order["calls"]):
            before = seconds()
            answer["out"].append(worker.call(order["do"]))
            wall, cpu = since(before)
            answer["wall"].append(wall)
            answer["cpu"].append(cpu)
        answer["compile"] = worker.compile_seconds.get(order["do"], (0.0, 0.0))
        answer["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answer["temporaries"] = getattr(worker, "temporaries", 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
