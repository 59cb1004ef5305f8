"""All four kinds of call, with metadata each way."""
import os, sys
import grpc

creds = grpc.ssl_channel_credentials(open(os.environ["SSL_CERT_FILE"], "rb").read())
channel = grpc.secure_channel("grpc.example:443", creds)
meta = (("authorization", f"Bearer {sys.argv[1]}"),)
big = b"x" * 300_000
answer, call = channel.unary_unary("/demo.Echo/Unary").with_call(big, metadata=meta, timeout=20)
assert answer == big and ("x-end", "Unary") in [tuple(pair) for pair in call.trailing_metadata()]
down = list(channel.unary_stream("/demo.Echo/Down")(b"down", metadata=meta, timeout=20))
assert down == [b"down"] * 3, down
up = channel.stream_unary("/demo.Echo/Up")(iter([b"a", b"b", b"c"]), metadata=meta, timeout=20)
assert up == b"abc", up
both = channel.stream_stream("/demo.Echo/Both")(iter([b"1", b"2"]), metadata=meta, timeout=20)
assert list(both) == [b"1", b"2"]
try:
    channel.unary_unary("/demo.Echo/Unary")(b"", metadata=(("authorization", "Bearer wrong"),), timeout=20)
    raise SystemExit("a wrong token was let in")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED, error
print("unary, down, up, both")
