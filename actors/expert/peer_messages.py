"""What ranks say to each other to copy experts: a request per piece, and the piece.

Owns the words. An expert travels as the parts of `stored.py`; a piece is a stretch of one part. Nothing is kept
between two requests, so whoever gives can stop at any time, and memory is bounded by what whoever takes asks for.
"""

from msgspec import Struct

from actors.wire import Codec

PIECE_BYTES = 4 * 1024 * 1024  # the longest piece
PIECES_IN_FLIGHT = 4  # that a taker asks of one giver at a time


class AskPiece(Struct, frozen=True, array_like=True, kw_only=True):
    """Stored bytes [begin, end) of a part of an expert, please. `weights` names the model, and the form it is held in.

    `ask` is the taker's own number for this request.
    """

    ask: int
    weights: str
    layer: int
    expert: int
    part: int
    begin: int
    end: int


class PieceHeader(Struct, frozen=True, array_like=True, kw_only=True):
    """Answers AskPiece; a frame with the bytes follows, empty where there is a `problem`.

    `dtype` and `shape` are the whole part's, `checksum` is the whole expert's.
    """

    ask: int
    problem: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    checksum: int = 0


ASK_PIECE: Codec[AskPiece] = Codec(AskPiece)
PIECE_HEADER: Codec[PieceHeader] = Codec(PieceHeader)
