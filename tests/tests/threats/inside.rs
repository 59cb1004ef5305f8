//! Addresses that lists of denied ranges forget, the host's own and the tap's gateway among them: by a name that resolves there,
//! and directly, with the widest rules that an account can make.

use super::{
    field::{Event, Field, Real, on_field, the_attacker_sees_what_comes},
    wire::{has_status, https, tcp},
};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use tapgate_e2e::{
    net, sh,
    sites::{self, ECHO, HOST_V4, HOST_V6},
};

const VALUE: &str = "sk-live-inside-c3a81f60b94d4e27";
const REALS: &[Real] = &[Real { value: VALUE, sites: &[ECHO] }];
/// The gateway that every guest routes through.
const GATEWAY: &str = "169.254.77.1";

/// Addresses that no rule opens, and the words of the audit for them.
const CLOSED: &[(&str, &str)] = &[
    ("0.0.0.0", "loopback"),
    ("0.1.2.3", "loopback"),
    ("127.0.0.1", "loopback"),
    ("127.9.9.9", "loopback"),
    ("169.254.169.254", "link_local"),
    ("169.254.170.2", "link_local"),
    (GATEWAY, "host_address"),
    ("100.100.100.200", "link_local"),
    ("168.63.129.16", "link_local"),
    ("192.0.0.192", "reserved"),
    ("192.88.99.1", "reserved"),
    ("224.0.0.1", "multicast"),
    ("240.0.0.1", "reserved"),
    ("255.255.255.255", "broadcast"),
    ("10.214.200.9", "other_vm"),
    ("::", "loopback"),
    ("::1", "loopback"),
    ("::ffff:127.0.0.1", "reserved"),
    ("::ffff:192.0.2.10", "reserved"),
    ("::192.0.2.10", "reserved"),
    ("64:ff9b::7f00:1", "reserved"),
    ("64:ff9b::c000:20a", "reserved"),
    ("64:ff9b:1::1", "reserved"),
    ("2002:7f00:1::", "reserved"),
    ("2001::1", "reserved"),
    ("fe80::1", "link_local"),
    ("fec0::1", "reserved"),
    ("fd00:ec2::254", "link_local"),
    ("ff02::1", "multicast"),
    ("100::1", "reserved"),
];
/// Those that a range rule opens, and no name.
const PRIVATE: &[&str] = &[
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.254",
    "192.168.1.1",
    "100.64.0.1",
    "100.127.255.254",
    "198.18.0.1",
    "fd12::1",
];

#[test]
fn no_name_and_no_address_leads_inside() {
    on_field(REALS, |field| {
        field.api().rule("host", ECHO.name).unwrap();
        let key = field.api().secret("key", "KEY", VALUE, &["*"]).unwrap();
        // What listens on the host would answer whoever got there.
        let host = field.world().names().host();
        let script = "import http.server, socket\n\
            class S(http.server.ThreadingHTTPServer): address_family = socket.AF_INET6\n\
            S(('::', 80), http.server.SimpleHTTPRequestHandler).serve_forever()";
        let folder = field.world().folder().join("canary");
        std::fs::create_dir_all(&folder).unwrap();
        let mut canary = net::inside(&host, "python3")
            .args(["-c", script])
            .current_dir(&folder)
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let probe =
            ["-sS", "--retry", "50", "--retry-connrefused", "--retry-delay", "1", "http://127.0.0.1/"];
        sh::expect(net::inside(&host, "curl").args(probe), b"").unwrap();
        let before = field.world().counters().unwrap();
        by_name(field, &key);
        directly(field, &key);
        canary.kill().unwrap();
        canary.wait().unwrap();
        let arrived = field.world().counters().unwrap().since(&before);
        let strays = arrived.any() - arrived.of(sites::DNS);
        field.check(strays == 0, || format!("{strays} packets left: {arrived:?}"));
        let own =
            format!("GET /own HTTP/1.1\r\nHost: {}\r\nX-Key: {key}\r\nConnection: close\r\n\r\n", ECHO.name);
        let to = SocketAddr::from((ECHO.v4, 443));
        field.attempt("the value's own host", &[Event::Passed("host")], || {
            https(to, ECHO.name, own.as_bytes())
        });
        the_attacker_sees_what_comes(field);
    });
}

/// A name that the rules allow resolves to the address, for no time.
fn by_name(field: &mut Field<'_>, key: &str) {
    let any = field.api().rule("host", "*").unwrap();
    let own = [HOST_V4.to_string(), HOST_V6.to_string()];
    let all = CLOSED.iter().map(|(address, _)| *address).chain(PRIVATE.iter().copied());
    for address in all.chain(own.iter().map(String::as_str)) {
        let name = sites::inward(address.parse::<IpAddr>().unwrap());
        let what = format!("a name that leads to {address}");
        let request = format!("GET / HTTP/1.1\r\nHost: {name}\r\nX-Key: {key}\r\nConnection: close\r\n\r\n");
        let got = field.attempt(&what, &[Event::Refused("rebinding")], || {
            tcp(SocketAddr::from((ECHO.v4, 80)), request.as_bytes())
        });
        field.check(has_status(&got, 403), || format!("{what}: {}", String::from_utf8_lossy(&got)));
        let what = format!("TLS to a name that leads to {address}");
        field.attempt(&what, &[Event::Refused("rebinding")], || {
            https(SocketAddr::from((ECHO.v4, 443)), &name, request.as_bytes())
        });
        let done = field.stage.sh(&format!("dig +short {name} A; dig +short {name} AAAA")).unwrap();
        field.check(done.out.trim().is_empty(), || format!("DNS gives {address}: {done:?}"));
        field.expect_events(&format!("DNS of {address}"), &[]);
    }
    field.api().remove_rule(&any).unwrap();
}

/// The guest connects to the address itself, writing an allowed name: with a rule for every address, all but those are open.
fn directly(field: &mut Field<'_>, key: &str) {
    let request =
        format!("GET / HTTP/1.1\r\nHost: {}\r\nX-Key: {key}\r\nConnection: close\r\n\r\n", ECHO.name);
    let all = [field.api().rule("cidr", "0.0.0.0/0").unwrap(), field.api().rule("cidr", "::/0").unwrap()];
    let own = [(HOST_V4.to_string(), "host_address"), (HOST_V6.to_string(), "host_address")];
    let rows = CLOSED.iter().map(|(address, reason)| ((*address).to_owned(), *reason));
    for (address, reason) in rows.chain(own) {
        let to: IpAddr = address.parse().unwrap();
        // These a guest's own kernel keeps, or gives to nobody: they never are on the wire.
        let kept = to.is_loopback() || to.is_unspecified() || address == "255.255.255.255";
        let mapped = matches!(to, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some());
        // The guest's service, which every guest may use, and the scope of a link that no socket was told.
        let own = address == "169.254.169.254" || address == "fe80::1";
        if kept || mapped || own || address.starts_with("127.") || address == "0.0.0.0" {
            continue;
        }
        for port in [80, 7070, 7710, 22000] {
            let what = format!("{address}, port {port}, directly");
            let got = field.guest(&what, || tcp(SocketAddr::new(to, port), request.as_bytes()));
            field.check(got.is_empty(), || format!("{what}: {}", String::from_utf8_lossy(&got)));
            if !to.is_multicast() {
                field.expect_refusal(&what, &[reason, "ipv6"]);
            }
        }
        let what = format!("{address} by UDP");
        field.guest(&what, || {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let _ = UdpSocket::bind(any).and_then(|socket| socket.send_to(b"x", (to, 9999)));
            Vec::new()
        });
        // A guest's chatter by multicast is counted, and no event.
        if !to.is_multicast() {
            field.expect_refusal(&what, &[reason, "ipv6"]);
        }
    }
    for rule in all {
        field.api().remove_rule(&rule).unwrap();
    }
    // Private ranges need a rule of their own.
    for address in PRIVATE {
        let what = format!("{address} directly, without a rule");
        let to: IpAddr = address.parse().unwrap();
        let other = request.replace(ECHO.name, address);
        let got = field.guest(&what, || tcp(SocketAddr::new(to, 80), other.as_bytes()));
        field.expect_refusal(&what, &["private", "address_literal", "bad_name", "no_rule"]);
        field.check(!has_status(&got, 200), || format!("{what}: {}", String::from_utf8_lossy(&got)));
    }
}
