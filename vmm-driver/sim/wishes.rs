//! What a test wants of the simulated VMM besides what its specification says, as variables of the seed that it is given.

/// What stands behind `name=`, if the seed has it.
pub fn wish(name: &str) -> Option<String> {
    let (seed, name) = (std::fs::read("/vm/seed").unwrap(), format!("{name}="));
    let at = seed.windows(name.len()).position(|window| window == name.as_bytes())?;
    let ours = |b: &u8| b.is_ascii_alphanumeric() || b"/._-:".contains(b);
    // The first that the seed has is for a shell.
    let value = seed[at + name.len()..].strip_prefix(b"'")?;
    let text: Vec<u8> = value.iter().copied().take_while(ours).collect();
    Some(String::from_utf8(text).unwrap())
}

/// How often it refuses to let its guest go on.
pub fn refusals() -> u32 {
    wish("REFUSALS").map_or(0, |text| text.parse().unwrap())
}

/// Whether its guest can hold its file systems still.
pub fn freezes() -> bool {
    wish("FREEZES").as_deref() != Some("no")
}
