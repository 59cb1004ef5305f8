// Node's own HTTP server, in both versions on one port, for whoever has the right token: says back what came, informs by 103 before it
// answers, asks for a body by 100, and ends with trailers.
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import http2 from "node:http2";

const [certFile, keyFile, value, host] = process.argv.slice(2);
const options = { allowHTTP1: true, cert: readFileSync(certFile), key: readFileSync(keyFile) };

function answer(request, response) {
  if (request.headers.authorization !== `Bearer ${value}`) {
    response.writeHead(401);
    response.end();
    return;
  }
  response.writeEarlyHints({ link: "</style.css>; rel=preload; as=style" });
  const hash = createHash("sha256");
  let octets = 0;
  request.on("data", (part) => {
    octets += part.length;
    hash.update(part);
  });
  request.on("end", () => {
    response.writeHead(200, { "content-type": "text/plain", trailer: "x-sum" });
    response.write(`Node HTTP/${request.httpVersion} ${request.headers.authorization} ${octets} octets `);
    response.addTrailers({ "x-sum": hash.digest("hex") });
    response.end(`${request.trailers["x-sent"] ?? "no"} trailer\n`);
  });
}

const server = http2.createSecureServer(options, answer);
server.on("checkContinue", (request, response) => {
  response.writeContinue();
  answer(request, response);
});
server.listen(443, host);
