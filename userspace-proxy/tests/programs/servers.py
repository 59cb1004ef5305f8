"""What no general server offers: server-sent events (aiohttp), WebSocket (websockets) and gRPC (grpcio), each over TLS and only for the right token."""
import asyncio, ssl, sys
from concurrent import futures

import grpc
from aiohttp import web
from websockets.asyncio.server import serve

cert, key, value, events_at, chat_at, grpc_at = sys.argv[1:]
RIGHT = f"Bearer {value}"


def echo(name, arity, body):
    def checked(request, context):
        if dict(context.invocation_metadata()).get("authorization") != RIGHT:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong token")
        context.set_trailing_metadata((("x-end", name),))
        return body(request)

    return name, getattr(grpc, f"{arity}_rpc_method_handler")(checked)


def down(request):
    for _ in range(3):
        yield request


def both(requests):
    yield from requests


class Echo(grpc.GenericRpcHandler):
    methods = dict(
        [
            echo("Unary", "unary_unary", lambda request: request),
            echo("Down", "unary_stream", down),
            echo("Up", "stream_unary", lambda requests: b"".join(requests)),
            echo("Both", "stream_stream", both),
        ]
    )

    def service(self, call):
        return self.methods.get(call.method.rsplit("/", 1)[-1])


async def events(request):
    if request.headers.get("Authorization") != RIGHT:
        return web.Response(status=401)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for number in range(3):
        await response.write(f"data: event {number} for {value}\n\n".encode())
        await asyncio.sleep(0.02)
    return response


async def chat(socket):
    if socket.request.headers.get("Authorization") not in (None, RIGHT):
        return await socket.close(1008, "wrong token")
    async for message in socket:
        await socket.send(f"said {message}")


async def main():
    server = grpc.server(futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((Echo(),))
    pair = (open(key, "rb").read(), open(cert, "rb").read())
    server.add_secure_port(f"{grpc_at}:443", grpc.ssl_server_credentials([pair]))
    server.start()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert, key)
    app = web.Application()
    app.router.add_get("/events", events)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, events_at, 443, ssl_context=tls).start()
    async with serve(chat, chat_at, 443, ssl=tls):
        await asyncio.Event().wait()


asyncio.run(main())
