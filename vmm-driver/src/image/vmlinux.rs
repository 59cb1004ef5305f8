//! The kernel inside a bzImage, for VMMs that start it at its entry point instead of going through its boot code.
//!
//! x86 boot protocol (kernel documentation `arch/x86/boot.rst`): `payload_offset` says where the compressed ELF file lies.
//! The decompressors are memory-safe ones: an imported image's kernel is not trusted by the host.

use super::{Image, ImageError};
use crate::durable;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

/// The largest kernel that is unpacked.
const MAX: u64 = 512 << 20;
/// One block of the old LZ4 format that kernels use.
const LZ4_BLOCK: usize = 8 << 20;

/// The image's kernel as an ELF file beside it, unpacked the first time.
pub fn unpacked(image: &Image) -> Result<PathBuf, ImageError> {
    let name = format!("vmlinux-{}", image.manifest().kernel.sha256.get(..16).unwrap_or("unknown"));
    let path = image.dir().join(name);
    if path.exists() {
        return Ok(path);
    }
    let kernel = image.kernel();
    let packed = fs::read(&kernel).map_err(ImageError::io(&kernel))?;
    let elf =
        unpack(&packed).map_err(|reason| ImageError::Build(format!("{}: {reason}", kernel.display())))?;
    let new = path.with_extension(format!("new-{}", std::process::id()));
    fs::write(&new, elf).map_err(ImageError::io(&new))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o644)).map_err(ImageError::io(&new))?;
    durable::name(&new, &path).map_err(ImageError::io(&path))?;
    Ok(path)
}

/// The ELF file in a bzImage; one that is an ELF file already is taken as it is.
pub fn unpack(kernel: &[u8]) -> Result<Vec<u8>, String> {
    if is_elf(kernel) {
        return Ok(kernel.to_vec());
    }
    let payload =
        payload(kernel).ok_or("it is neither an ELF file nor a bzImage of boot protocol 2.08 or later")?;
    let mut elf = Vec::new();
    let read = |reader: &mut dyn Read, elf: &mut Vec<u8>| reader.take(MAX).read_to_end(elf).map(drop);
    let done: io::Result<()> = match payload {
        [0x1f, 0x8b, ..] => read(&mut flate2::read::GzDecoder::new(payload), &mut elf),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ruzstd::decoding::StreamingDecoder::new(payload)
            .map_err(io::Error::other)
            .and_then(|mut reader| read(&mut reader, &mut elf)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            read(&mut lzma_rust2::XzReader::new(payload, false), &mut elf)
        }
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => lz4(blocks, &mut elf),
        _ => return Err("it is packed in a way that is not known here (gzip, xz, lz4 and zstd are)".into()),
    };
    done.map_err(|error| format!("it cannot be unpacked: {error}"))?;
    if is_elf(&elf) { Ok(elf) } else { Err("what is packed in it is no ELF file".into()) }
}

fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF")
}

fn payload(kernel: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(kernel.get(at..at + 4)?.try_into().ok()?));
    if kernel.get(0x202..0x206)? != b"HdrS"
        || u16::from_le_bytes(kernel.get(0x206..0x208)?.try_into().ok()?) < 0x208
    {
        return None;
    }
    let sectors = match *kernel.get(0x1f1)? {
        0 => 4,
        n => usize::from(n),
    };
    let start = ((sectors + 1) * 512).checked_add(usize::try_from(word(0x248)?).ok()?)?;
    let length = usize::try_from(word(0x24c)?).ok()?;
    kernel.get(start..start.checked_add(length)?)
}

/// The old LZ4 format: blocks, each with its length in front. The kernel's build puts the unpacked size behind them.
fn lz4(mut blocks: &[u8], elf: &mut Vec<u8>) -> io::Result<()> {
    let broken = || io::Error::from(io::ErrorKind::InvalidData);
    let mut buffer = vec![0u8; LZ4_BLOCK];
    while let [a, b, c, d, rest @ ..] = blocks
        && !rest.is_empty()
    {
        let length = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        let block = rest.get(..length).ok_or_else(broken)?;
        let n = lz4_flex::block::decompress_into(block, &mut buffer).map_err(io::Error::other)?;
        if elf.len() + n > MAX as usize {
            return Err(io::Error::other("it is too large"));
        }
        elf.extend_from_slice(&buffer[..n]);
        blocks = &rest[length..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0u8; 5 * 512];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(&[0; 16]);
        image.extend_from_slice(payload);
        image.extend_from_slice(b"and the rest");
        image
    }

    fn elf() -> Vec<u8> {
        let mut elf = b"\x7fELF".to_vec();
        (0..200_000u32).for_each(|n| elf.extend_from_slice(&n.to_le_bytes()));
        elf
    }

    fn packed(program: &str, args: &[&str]) -> Option<Vec<u8>> {
        let mut child =
            Command::new(program).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
        let mut input = child.stdin.take()?;
        std::thread::spawn(move || input.write_all(&elf()));
        Some(child.wait_with_output().ok()?.stdout)
    }

    #[test]
    fn every_packing_that_kernels_use_is_unpacked() {
        let mut tried = 0;
        for (program, args) in [
            ("gzip", &["-c"][..]),
            ("xz", &["--check=crc32", "--x86", "--lzma2=dict=1MiB", "-c"][..]),
            ("zstd", &["-19", "-c"][..]),
            ("lz4", &["-l", "-c"][..]),
        ] {
            let Some(mut bytes) = packed(program, args) else { continue };
            if program != "gzip" {
                bytes.extend_from_slice(&(elf().len() as u32).to_le_bytes());
            }
            assert!(unpack(&bzimage(&bytes)).unwrap() == elf(), "{program}");
            tried += 1;
        }
        assert!(tried >= 2, "gzip and xz are on every Debian");
        assert!(unpack(&elf()).unwrap() == elf());
    }

    #[test]
    fn rubbish_is_refused_with_a_reason() {
        let gzip = packed("gzip", &["-c"]).unwrap();
        let mut cut = bzimage(&gzip);
        cut.truncate(3000);
        for (kernel, reason) in [
            (b"rubbish".to_vec(), "neither"),
            (cut, "neither"),
            (bzimage(&gzip[..1000]), "cannot be unpacked"),
            (bzimage(b"????"), "not known here"),
            (bzimage(&[0x02, 0x21, 0x4c, 0x18, 0xff, 0xff, 0xff, 0xff, 1]), "cannot be unpacked"),
        ] {
            let error = unpack(&kernel).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
