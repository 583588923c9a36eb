"""Every command of the README, one by one in a copy of the project, in its order, with tiny settings."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from test_house import ROOT, commands, readme

SHAPE = "--d_model 32 --n_layers 1 --n_heads 2 --n_kv_heads 2 --d_ff 64 --max_seq_len 256 --no-compile"
STEPS = "--max_steps 4 --batch_size 4 --eval_every 4 --save_every 4"
TINY = {                        # added to a command of this script; the last word of a flag counts
    "data.world": "", "data.instructions": "--examples 240 --prompts 60",
    "tokenizer.py": "--vocab_size 512", "data.prepare": "",
    "pretrain.py": f"{SHAPE} {STEPS} --micro_batch_size 2 --eval_documents 4",
    "generate.py": "--max_new_tokens 8", "sft.py": f"{STEPS} --epochs 0",
    "evaluate.py": "--limit 2 --max_new_tokens 8 --best_of 2", "report.py": "",
    "sample": "--limit 40 --max_new_tokens 12", "rate": "", "simulate": "--temperature 2", "collect": "",
    "reward.py": "--bootstrap 5 --val_share 0.4",
    "ppo.py": f"{STEPS} --batch_size 8 --response_length 8 --force", "serve.py": "--port 8123",
    "bench.py": f"{SHAPE} --batch_size 2 --rounds 1 --new_tokens 4 --sample_batches 2 --vocab_size 512",
}
TYPED = {"--chat": "Who are you?\n/quit\n", "rate": "1>2\nq\n"}


def tiny(command):
    """The command line to run, and what is typed at it."""
    name, *words = command
    script = next(word for word in words if word in TINY)
    part = next((word for word in words if word in ("sample", "rate", "simulate", "collect")), script)
    nothing_runs = "--runs" in words or "--resume" in words or script == "sft.py" and "--show" in words
    if name == "torchrun":
        words = [re.sub(r"(nproc_per_node)=\d+", r"\1=2", word) for word in words]
    start = [sys.executable, *["-m", "torch.distributed.run"] * (name == "torchrun")]
    typed = next((text for word, text in TYPED.items() if word in words), "")
    return [*start, *words, *([] if nothing_runs else TINY[part].split())], typed


@pytest.mark.full
def test_every_command_of_the_readme_runs(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("uvicorn")
    home = tmp_path / "sprout"
    shutil.copytree(ROOT, home, ignore=shutil.ignore_patterns(".*", "out", "scratch", "__pycache__"))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}

    def do(line, typed=""):
        done = subprocess.run(line, cwd=home, env=env, input=typed, capture_output=True, text=True,
                              encoding="utf-8", timeout=300)
        assert done.returncode == 0, f"{' '.join(line)}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"

    do([sys.executable, "-m", "data.world", "--out_dir", "text", "--megabytes", "0.1"])
    shutil.copy(home / "text/train.en.txt", home / "stories.txt")
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    (home / "chats.json").write_text(json.dumps([{"messages": chat}] * 20))
    (home / "questions.jsonl").write_text("".join(
        json.dumps({"question": f"What is {i}?", "answer": f"{i}."}) + "\n" for i in range(40)))
    ran = 0
    for command in commands(readme()):
        if command[0] == "make":
            continue                                            # tests/test_chain.py
        line, typed = tiny(command)
        ran += 1
        if "serve.py" not in line:
            do(line, typed)
            continue
        server = subprocess.Popen(line, cwd=home, env=env)
        try:
            for _ in range(240):
                try:
                    assert json.load(urllib.request.urlopen("http://127.0.0.1:8123/health"))["status"] == "ok"
                    break
                except OSError:
                    assert server.poll() is None
                    time.sleep(0.5)
            else:
                raise AssertionError("serve.py did not answer")
        finally:
            server.terminate()
            server.wait()
    assert ran > 20 and (home / "out/report.html").is_file() and Path(home / "out/ratings.jsonl").is_file()
