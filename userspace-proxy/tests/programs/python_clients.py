"""One request by the library that the first argument names."""
import asyncio, os, ssl, sys

library, url, token = sys.argv[1:]
headers = {"Authorization": f"Bearer {token}"}
tls = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])

if library == "urllib":
    import urllib.request

    request = urllib.request.Request(url, headers=headers)
    print(urllib.request.urlopen(request, context=tls).read().decode())
elif library == "requests":
    import requests

    with requests.Session() as session:
        for _ in range(2):
            print(session.get(url, headers=headers).text)
elif library in ("httpx", "httpx2"):
    import httpx

    with httpx.Client(http2=library == "httpx2", verify=tls) as client:
        for _ in range(2):
            print(client.get(url, headers=headers).text)
elif library == "httpx-sse":
    import httpx
    from httpx_sse import connect_sse

    with httpx.Client(verify=tls) as client, connect_sse(client, "GET", url, headers=headers) as source:
        for event in source.iter_sse():
            print(event.data)
elif library == "aiohttp":
    import aiohttp

    async def main():
        async with aiohttp.ClientSession() as session, session.get(url, headers=headers, ssl=tls) as response:
            print(await response.text())

    asyncio.run(main())
elif library == "websockets":
    from websockets.sync.client import connect

    with connect(url, additional_headers=headers, ssl=tls) as socket:
        for word in ("one", "two"):
            socket.send(word)
            print(socket.recv())
