"""`tfgptopt chat` in a process of its own, with lines as input and in a terminal."""

import os
import pty
import select
import subprocess
import sys

import keras
import keras_hub
import pytest
from data.chatty import gemma_tokenizer

import tfgptopt

COMMAND = [sys.executable, "-m", "tfgptopt.cli.main", "chat"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    keras.utils.set_random_seed(2)
    tokenizer = gemma_tokenizer()
    backbone = keras_hub.models.GemmaBackbone(tokenizer.vocabulary_size(), 1, 2, 1, 32, 64, 16)
    preprocessor = keras_hub.models.GemmaCausalLMPreprocessor(tokenizer, sequence_length=64)
    model = keras_hub.models.GemmaCausalLM(backbone, preprocessor)
    return tfgptopt.export(model, tmp_path_factory.mktemp("chat") / "gpt.tflite")


def test_lines_of_a_pipe_are_messages(file, tmp_path):
    lines = "hello\n\n/reset\nhello\n" + "long " * 90 + "\n/quit\nnever\n"
    command = [*COMMAND, str(file), "--max-new-tokens", "4", "--seed", "1", "--top-k", "3"]
    result = subprocess.run(command, input=lines, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()[:2]
    assert first == second
    assert "Error: The session would have" in result.stderr and "never" not in result.stdout
    result = subprocess.run([*COMMAND, str(file)], input="", capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_a_template_that_does_not_compile_is_one_sentence(file, tmp_path):
    (tmp_path / "bad.jinja").write_text("{% if %}", "utf-8")
    command = [*COMMAND, str(file), "--template", str(tmp_path / "bad.jinja")]
    result = subprocess.run(command, input="a\n", capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: The chat template does not compile")


def test_a_terminal_has_a_prompt_and_ends_with_ctrl_c_and_ctrl_d(file):
    for end in (b"\x03", b"\x04", b"/quit\n"):
        ours, theirs = pty.openpty()
        # The child takes the terminal itself: code between fork and exec could wait for a thread
        # of this process for ever. And it hears Ctrl-C, which a shell in the background ignores.
        code = (
            "import fcntl, signal, sys, termios\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "from tfgptopt.cli.main import main\n"
            f"sys.argv = ['tfgptopt', 'chat', {str(file)!r}, '--max-new-tokens', '2']\n"
            "main()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        seen = b""
        while b"> " not in seen:
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 1024)
        # A key that comes between the prompt and the reading of it may be lost, as anywhere: a
        # person presses it again.
        try:
            for _ in range(60):
                os.write(ours, end)
                while select.select([ours], [], [], 1)[0] and (piece := os.read(ours, 1024)):
                    seen += piece
        except OSError:  # The other end was closed.
            pass
        assert process.wait(60) == 0
        assert b"/reset forgets" in seen and b"Traceback" not in seen
        os.close(ours)
