//! Streams and handshakes by hand, as far as a target has to read them.

/// A channel's handshake, all zero but for magic, version and id.
pub fn hello(channel: u8) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[..8].copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1]);
    bytes[24] = channel;
    bytes
}

/// What a stream of ours begins with: magic, version, configuration with the machine's name.
pub fn preamble(machine: &str) -> Vec<u8> {
    let mut bytes = b"QEVM\0\0\0\x03\x07".to_vec();
    bytes.extend(
        u32::try_from(machine.len())
            .unwrap_or(u32::MAX)
            .to_be_bytes(),
    );
    bytes.extend(machine.as_bytes());
    bytes
}

/// The announcement of RAM: section 2, one block.
pub fn ram_setup(block: &str, length: u64) -> Vec<u8> {
    let mut bytes = vec![1, 0, 0, 0, 2, 3];
    bytes.extend(b"ram");
    bytes.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    bytes.extend((length | 4).to_be_bytes());
    bytes.push(u8::try_from(block.len()).unwrap_or(0));
    bytes.extend(block.as_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// End of a RAM section's records, and the footer of section 2.
pub const RAM_END: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0x10, 0x7e, 0, 0, 0, 2];

pub const OURS: &str = "colo-vmm-1";
pub const RAM: u64 = 16 << 20;
