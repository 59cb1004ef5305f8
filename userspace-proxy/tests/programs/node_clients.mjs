// One request by the client that the first argument names.
import http2 from "node:http2";
import https from "node:https";

const [kind, url, token] = process.argv.slice(2);
const authorization = `Bearer ${token}`;

if (kind === "fetch") {
  const response = await fetch(url, { headers: { authorization } });
  for await (const part of response.body) process.stdout.write(part);
} else if (kind === "https") {
  https.get(url, { headers: { authorization } }, (response) => response.pipe(process.stdout));
} else if (kind === "http2") {
  const session = http2.connect(url);
  const stream = session.request({ ":path": new URL(url).pathname, authorization });
  stream.pipe(process.stdout);
  stream.on("end", () => session.close());
} else if (kind === "websocket") {
  // The platform's own client cannot set a header: what is said passes with a cookie's worth of nothing.
  const socket = new WebSocket(url);
  socket.onopen = () => socket.send("one");
  let heard = 0;
  socket.onmessage = (event) => {
    console.log(event.data);
    heard += 1;
    if (heard === 2) socket.close();
    else socket.send("two");
  };
  socket.onerror = (event) => {
    console.error(event.message);
    process.exit(1);
  };
}
