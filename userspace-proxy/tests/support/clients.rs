//! The clients that workloads use: how each is run in a guest, and what it prints when it was served. `$T` is the token.

/// One client.
pub struct Client {
    pub name: &'static str,
    /// What it speaks.
    pub speaks: &'static str,
    /// Prints its version.
    pub version: &'static str,
    pub run: String,
    /// What it prints.
    pub expect: &'static str,
}

/// Programs that the clients are written in, by file name.
pub const FILES: &[(&str, &str)] = &[
    ("python_clients.py", include_str!("../programs/python_clients.py")),
    ("grpc_client.py", include_str!("../programs/grpc_client.py")),
    ("Get.java", include_str!("../programs/Get.java")),
    ("node_clients.mjs", include_str!("../programs/node_clients.mjs")),
];

const URL: &str = "https://api.example/echo";

fn client(
    name: &'static str,
    speaks: &'static str,
    version: &'static str,
    run: &str,
    expect: &'static str,
) -> Client {
    let run = run.replace("URL", URL).replace("HEADER", "-H \"Authorization: Bearer $T\"");
    Client { name, speaks, version, run, expect }
}

fn http() -> Vec<Client> {
    let curl = |name, speaks, flags: &str, expect| {
        client(name, speaks, "curl --version", &format!("curl -sS {flags} HEADER URL"), expect)
    };
    let python = |name, speaks, library: &str, url: &str, expect| {
        let package = library.trim_end_matches('2').to_owned();
        let version: &'static str = match package.as_str() {
            "urllib" => "python --version",
            "requests" => "pip show requests | grep Version",
            "httpx" => "pip show httpx | grep Version",
            "httpx-sse" => "pip show httpx-sse | grep Version",
            "aiohttp" => "pip show aiohttp | grep Version",
            _ => "pip show websockets | grep Version",
        };
        client(name, speaks, version, &format!("python python_clients.py {library} {url} $T"), expect)
    };
    let node = |name, speaks, kind: &str, url: &str, expect| {
        client(name, speaks, "node --version", &format!("node node_clients.mjs {kind} {url} $T"), expect)
    };
    let events = "https://events.example/events";
    let chat = "wss://chat.example/";
    vec![
        curl("curl", "HTTP/1.0", "-0", "HTTP/1"),
        curl("curl", "HTTP/1.1", "--http1.1", "HTTP/1.1"),
        curl("curl", "HTTP/2", "--http2", "HTTP/2.0"),
        curl("curl --compressed", "HTTP/2, gzip", "--compressed", "HTTP/2.0"),
        curl("curl --tls-max 1.2", "HTTP/2, TLS 1.2", "--tls-max 1.2", "HTTP/2.0"),
        curl("curl --no-alpn", "HTTP/1.1, no ALPN", "--no-alpn", "HTTP/1.1"),
        curl("curl, twice on one connection", "HTTP/2", "URL", "HTTP/2.0"),
        client("curl, redirect", "HTTP/2", "curl --version", "curl -sSi HEADER https://api.example/jump", "t=Bearer"),
        client("wget", "HTTP/1.1", "wget --version", "wget -qO- --header \"Authorization: Bearer $T\" --ca-certificate=$SSL_CERT_FILE URL", "HTTP/1.1"),
        client(
            "openssl s_client", "TLS 1.3, HTTP/1.1 by hand", "openssl version",
            "(printf \"GET /echo HTTP/1.1\\r\\nHost: api.example\\r\\nAuthorization: Bearer $T\\r\\nConnection: close\\r\\n\\r\\n\"; sleep 1) |
             openssl s_client -quiet -verify_return_error -CAfile $SSL_CERT_FILE -servername api.example -connect api.example:443 2>/dev/null",
            "HTTP/1.1",
        ),
        client("nghttp", "HTTP/2", "nghttp --version", "nghttp -H \"authorization: Bearer $T\" URL", "HTTP/2.0"),
        python("Python urllib", "HTTP/1.1", "urllib", URL, "HTTP/1.1"),
        python("Python requests", "HTTP/1.1, kept alive", "requests", URL, "HTTP/1.1"),
        python("Python httpx", "HTTP/1.1, kept alive", "httpx", URL, "HTTP/1.1"),
        python("Python httpx, HTTP/2", "HTTP/2", "httpx2", URL, "HTTP/2.0"),
        python("Python aiohttp", "HTTP/1.1", "aiohttp", URL, "HTTP/1.1"),
        python("Python httpx-sse", "server-sent events", "httpx-sse", events, "event 2 for"),
        python("Python websockets", "WebSocket", "websockets", chat, "said two"),
        node("Node fetch", "HTTP/1.1", "fetch", URL, "HTTP/1.1"),
        node("Node https", "HTTP/1.1", "https", URL, "HTTP/1.1"),
        node("Node http2", "HTTP/2", "http2", URL, "HTTP/2.0"),
        node("Node fetch, Node's server", "HTTP/1.1, 103, trailers", "fetch", "https://node.example/", "Node HTTP/1.1"),
        node("Node http2, Node's server", "HTTP/2, 103, trailers", "http2", "https://node.example/", "Node HTTP/2.0"),
        client(
            "curl, Node's server", "HTTP/2, an upload", "curl --version",
            "head -c 3000000 /dev/zero > zeros; curl -sSi HEADER -T zeros https://node.example/", "3000000 octets no trailer",
        ),
        client(
            "curl, Node's server", "HTTP/1.1, an upload that waits for 100", "curl --version",
            "head -c 3000000 /dev/zero > zeros; curl -sSi --http1.1 HEADER -H 'Expect: 100-continue' -H 'TE: trailers' -T zeros https://node.example/ > said
             grep -aq 'HTTP/1.1 100' said && grep -aqi 'x-sum: [0-9a-f]' said && cat said", "3000000 octets no trailer",
        ),
        node("Node fetch, events", "server-sent events", "fetch", events, "event 2 for"),
        node("Node WebSocket", "WebSocket", "websocket", chat, "said two"),
        client(
            "Java HttpClient, HttpURLConnection", "HTTP/2, HTTP/1.1", "java -version 2>&1",
            "keytool -importcert -noprompt -file ca1.pem -alias a -keystore trust -storepass changeit >/dev/null 2>&1
             keytool -importcert -noprompt -file ca2.pem -alias b -keystore trust -storepass changeit >/dev/null 2>&1
             java -Djavax.net.ssl.trustStore=trust -Djavax.net.ssl.trustStorePassword=changeit Get.java $T",
            "HTTP/2.0",
        ),
        client("Python grpcio", "gRPC, all four kinds", "pip show grpcio | grep Version", "python grpc_client.py $T", "unary, down, up, both"),
    ]
}

fn packages() -> Vec<Client> {
    vec![
        client(
            "git clone and push", "smart HTTP", "git --version",
            "git clone -q https://x:$T@git.example/repo.git work; cd work; cmp blob ../seed/blob
             date +%s%N > two; git add two; git -c user.name=a -c user.email=a@b commit -qm two; git push -q
             test $(git rev-parse HEAD) = $(git -C ../served/repo.git rev-parse main); echo pushed
             ! git clone -q https://x:wrong@git.example/repo.git no 2>&1",
            "pushed",
        ),
        client(
            "pip install", "HTTP/1.1, Basic", "pip --version",
            "pip install -q --no-cache-dir --disable-pip-version-check --cert $SSL_CERT_FILE --index-url https://x:$T@pypi.example/simple/ --target out demo
             python out/demo.py",
            "demo from pypi",
        ),
        client(
            "npm install", "HTTP/1.1, Bearer", "npm --version",
            "mkdir project; cd project
             printf \"registry=https://npm.example/\\n//npm.example/:_authToken=$T\\ncafile=$SSL_CERT_FILE\\n\" > .npmrc
             npm install --silent --no-audit --no-fund --no-update-notifier demo; node -e \"require('demo')\"",
            "demo from npm",
        ),
        client(
            "cargo fetch", "HTTP/2, a bare token", "$CARGO --version",
            "mkdir -p crate/src crate/.cargo; cd crate; touch src/lib.rs
             printf \"[package]\\nname = 'c'\\nversion = '1.0.0'\\nedition = '2021'\\n[dependencies]\\ndemo = { version = '1', registry = 'local' }\\n\" > Cargo.toml
             printf \"[registries.local]\\nindex = 'sparse+https://crates.example/'\\n[registry]\\nglobal-credential-providers = ['cargo:token']\\n\" > .cargo/config.toml
             CARGO_HTTP_CAINFO=$SSL_CERT_FILE CARGO_HOME=$HOME/cargo CARGO_REGISTRIES_LOCAL_TOKEN=$T $CARGO fetch -q
             ls $HOME/cargo/registry/src/*/demo-1.0.0/src/lib.rs",
            "demo-1.0.0",
        ),
        client(
            "apt-get update and download", "HTTP/1.1, Basic", "apt-get --version",
            "mkdir -p apt/lists/partial apt/cache/archives/partial; cd apt; touch status
             echo \"deb [trusted=yes] https://apt.example/ ./\" > sources.list; echo \"machine apt.example login x password $T\" > auth.conf
             cat > apt.conf <<END
Dir::State \"$PWD\"; Dir::State::status \"$PWD/status\"; Dir::State::Lists \"$PWD/lists\"; Dir::Cache \"$PWD/cache\"; Dir::Etc::sourcelist \"$PWD/sources.list\";
Dir::Etc::sourceparts \"-\"; Dir::Etc::netrc \"$PWD/auth.conf\"; Dir::Etc::netrcparts \"-\"; APT::Sandbox::User \"root\";
Acquire::https::CaInfo \"$SSL_CERT_FILE\"; Acquire::Languages \"none\"; Acquire::Retries \"0\";
END
             APT_CONFIG=$PWD/apt.conf apt-get -qq update; APT_CONFIG=$PWD/apt.conf apt-get -qq download demo; ls demo_1.0_all.deb",
            "demo_1.0_all.deb",
        ),
    ]
}

/// All of them.
pub fn all() -> Vec<Client> {
    http().into_iter().chain(packages()).collect()
}
