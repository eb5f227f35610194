"""The model waits until clients were told, since LiteRT keeps Python's lock while it computes."""

import asyncio
import threading

import pytest

from tfgptopt.serving.scheduling import Answer, Piece, _call


def test_pieces_have_been_read_and_written_when_the_model_goes_on():
    started, written = threading.Event(), []
    answers = []

    async def client():
        answers.append(Answer(None, asyncio.get_running_loop()))
        started.set()
        async for piece in answers[0].read():
            await asyncio.sleep(0)  # As a server does between a piece and its socket.
            written.append(piece.text)
        await asyncio.sleep(0.1)  # A server's loop goes on.

    thread = threading.Thread(target=lambda: asyncio.run(client()))
    thread.start()
    assert started.wait(10)
    for number, reason in enumerate((None, None, "stop")):
        sent = _call(answers[0].loop, [(answers[0], Piece(str(number), 1, (), reason, None))])
        assert sent.wait(10) and written == [str(n) for n in range(number + 1)]
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.filterwarnings("error")
def test_a_loop_that_is_closed_holds_nobody_up():
    loop = asyncio.new_event_loop()
    loop.close()
    assert _call(loop, []).is_set()
