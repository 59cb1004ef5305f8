//! The table of what building and testing need from the machine. Data only; looks at nothing itself.

/// How one sees that something is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// A compiler for the BPF target with the sources of `core`.
    BpfCompiler,
    /// This file or folder exists.
    File(&'static str),
    /// A program of this name can be run.
    Program(&'static str),
}

/// One thing that is needed.
#[derive(Debug)]
pub struct Need {
    /// What people call it.
    pub what: &'static str,
    /// What needs it.
    pub why: &'static str,
    /// It is there when all of these are.
    pub signs: &'static [Sign],
    /// The Debian packages that bring it.
    pub packages: &'static [&'static str],
}

/// Everything, in the order in which it is reported.
pub const NEEDS: &[Need] = &[
    Need {
        what: "a C compiler",
        why: "linking, and the C parts of the crates",
        signs: &[Sign::Program("cc"), Sign::Program("make"), Sign::Program("pkg-config")],
        packages: &["gcc", "g++", "libc6-dev", "make", "pkg-config"],
    },
    Need {
        what: "Rust for the BPF target",
        why: "the BPF programs",
        signs: &[Sign::BpfCompiler],
        packages: &["rustc-web", "rust-web-src", "cargo-web"],
    },
    Need {
        what: "LLVM 22",
        why: "bpf-linker",
        signs: &[Sign::File("/usr/lib/llvm-22/bin/llvm-config")],
        packages: &["llvm-22-dev"],
    },
    Need {
        what: "QEMU and its disk tool",
        why: "guests",
        signs: &[Sign::Program("qemu-system-x86_64"), Sign::Program("qemu-img")],
        packages: &["qemu-system-x86", "qemu-utils"],
    },
    Need {
        what: "mmdebstrap, mkfs.ext4 and sfdisk",
        why: "the base image",
        signs: &[Sign::Program("mmdebstrap"), Sign::Program("mkfs.ext4"), Sign::Program("sfdisk")],
        packages: &["mmdebstrap", "e2fsprogs", "fdisk"],
    },
    Need {
        what: "ip and nft",
        why: "the network of guests and tests",
        signs: &[Sign::Program("ip"), Sign::Program("nft"), Sign::Program("nsenter"), Sign::Program("ping")],
        packages: &["iproute2", "nftables", "util-linux", "iputils-ping"],
    },
    Need {
        what: "OpenSSH",
        why: "reaching guests, and guests of the namespace driver",
        signs: &[Sign::Program("ssh"), Sign::Program("ssh-keygen"), Sign::Program("sshd")],
        packages: &["openssh-client", "openssh-server"],
    },
    Need {
        what: "git with its HTTP backend",
        why: "tests with a git server",
        signs: &[Sign::Program("git")],
        packages: &["git"],
    },
    Need {
        what: "tools that look at images",
        why: "the image's, the disks' and the seed's tests",
        signs: &[
            Sign::Program("fsck.vfat"),
            Sign::Program("debugfs"),
            Sign::Program("cpio"),
            Sign::Program("mkfs.btrfs"),
        ],
        packages: &["dosfstools", "e2fsprogs", "cpio", "btrfs-progs"],
    },
    Need {
        what: "clients and a server",
        why: "the proxy's tests with what workloads really use",
        signs: &[
            Sign::Program("nginx"),
            Sign::Program("wget"),
            Sign::Program("nghttp"),
            Sign::Program("h2load"),
            Sign::Program("python3"),
            Sign::File("/usr/share/doc/python3-venv"),
            Sign::Program("node"),
            Sign::Program("javac"),
            Sign::Program("keytool"),
            Sign::Program("sysctl"),
        ],
        packages: &[
            "nginx-light",
            "wget",
            "nghttp2-client",
            "python3",
            "python3-venv",
            "nodejs",
            "default-jdk-headless",
            "procps",
        ],
    },
    Need {
        what: "curl, openssl and dig",
        why: "tests with real clients",
        signs: &[
            Sign::Program("curl"),
            Sign::Program("openssl"),
            Sign::Program("dig"),
            Sign::File("/etc/ssl/certs/ca-certificates.crt"),
        ],
        packages: &["curl", "openssl", "bind9-dnsutils", "ca-certificates"],
    },
];

/// What only `bench proxy` needs: the proxies that ours is measured beside.
pub const PEERS: &[Need] = &[Need {
    what: "other proxies",
    why: "bench",
    signs: &[
        Sign::Program("haproxy"),
        Sign::Program("nginx"),
        Sign::Program("squid"),
        Sign::File("/usr/lib/squid/security_file_certgen"),
        Sign::File("/usr/lib/nginx/modules/ngx_stream_module.so"),
    ],
    packages: &["haproxy", "squid-openssl", "nginx-light", "libnginx-mod-stream"],
}];

/// The packages of these needs, each once.
pub fn packages(needs: &[&Need]) -> Vec<&'static str> {
    let mut packages: Vec<&str> = needs.iter().flat_map(|need| need.packages).copied().collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_need_can_be_seen_and_satisfied() {
        for need in NEEDS.iter().chain(PEERS) {
            assert!(!need.signs.is_empty() && !need.packages.is_empty(), "{}", need.what);
        }
    }

    #[test]
    fn a_package_is_asked_for_once() {
        let need = Need { what: "x", why: "y", signs: &[], packages: &["b", "a"] };
        assert_eq!(packages(&[&need, &need]), ["a", "b"]);
    }
}
