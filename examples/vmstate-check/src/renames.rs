//! What QEMU has given another name while its bytes stayed the same. The names are those that
//! `scripts/vmstate-static-checker.py` of QEMU 11 lets pass.

/// Kinds of device.
const DEVICES: &[(&str, &str)] = &[("ICH9 LPC", "ICH9-LPC"), ("e1000-82540em", "e1000")];

/// By kind of device, the outermost description.
const DESCRIPTIONS: &[(&str, &str, &str)] = &[("ich9-ahci", "ahci", "ich9_ahci")];

/// By description, fields.
const FIELDS: &[(&str, &[(&str, &str)])] = &[
    ("I440FX", &[("dev", "parent_obj")]),
    ("PIIX3", &[("pci_irq_levels", "pci_irq_levels_vmstate")]),
    ("acpi-ghes", &[("ghes_addr_le", "hw_error_le")]),
    ("apic", &[("timer", "timer_expiry")]),
    (
        "cirrus_vga",
        &[
            ("hw_cursor_x", "vga.hw_cursor_x"),
            ("hw_cursor_y", "vga.hw_cursor_y"),
        ],
    ),
    ("e1000", &[("dev", "parent_obj")]),
    ("ehci", &[("dev", "pcidev")]),
    ("hpet", &[("num_timers", "num_timers_save")]),
    ("ich9_ahci", &[("card", "parent_obj")]),
    (
        "ioh-3240-express-root-port",
        &[
            ("port.br.dev", "parent_obj.parent_obj.parent_obj"),
            (
                "port.br.dev.exp.aer_log",
                "parent_obj.parent_obj.parent_obj.exp.aer_log",
            ),
        ],
    ),
    ("lsiscsi", &[("dev", "parent_obj")]),
    ("mch", &[("d", "parent_obj")]),
    (
        "pci_bridge",
        &[("bridge.dev", "parent_obj"), ("bridge.dev.shpc", "shpc")],
    ),
    ("pcnet", &[("pci_dev", "parent_obj")]),
    (
        "piix4_pm",
        &[
            ("dev", "parent_obj"),
            ("pci0_status", "acpi_pci_hotplug.acpi_pcihp_pci_status[0x0]"),
            ("pm1a.sts", "ar.pm1.evt.sts"),
            ("pm1a.en", "ar.pm1.evt.en"),
            ("pm1_cnt.cnt", "ar.pm1.cnt.cnt"),
            ("tmr.timer", "ar.tmr.timer"),
            ("tmr.overflow_time", "ar.tmr.overflow_time"),
            ("gpe", "ar.gpe"),
        ],
    ),
    ("qxl", &[("num_surfaces", "ssd.num_surfaces")]),
    ("rtl8139", &[("dev", "parent_obj")]),
    (
        "spapr_pci",
        &[
            ("dma_liobn[0]", "mig_liobn"),
            ("mem_win_addr", "mig_mem_win_addr"),
            ("mem_win_size", "mig_mem_win_size"),
            ("io_win_addr", "mig_io_win_addr"),
            ("io_win_size", "mig_io_win_size"),
        ],
    ),
    (
        "usb-ccid",
        &[("abProtocolDataStructure", "abProtocolDataStructure.data")],
    ),
    ("usb-host", &[("dev", "parent_obj")]),
    ("usb-mouse", &[("usb-ptr-queue", "HIDPointerEventQueue")]),
    ("usb-tablet", &[("usb-ptr-queue", "HIDPointerEventQueue")]),
    ("vmware_vga", &[("card", "parent_obj")]),
    ("vmware_vga_internal", &[("depth", "new_depth")]),
    ("xhci", &[("pci_dev", "parent_obj")]),
    (
        "xio3130-express-downstream-port",
        &[
            ("port.br.dev", "parent_obj.parent_obj.parent_obj"),
            (
                "port.br.dev.exp.aer_log",
                "parent_obj.parent_obj.parent_obj.exp.aer_log",
            ),
        ],
    ),
    (
        "xio3130-express-upstream-port",
        &[
            ("br.dev", "parent_obj.parent_obj"),
            ("br.dev.exp.aer_log", "parent_obj.parent_obj.exp.aer_log"),
        ],
    ),
];

/// The other name of a kind of device, newer or older.
pub(crate) fn device(name: &str) -> Option<&'static str> {
    DEVICES.iter().find_map(|&(old, new)| {
        (name == old)
            .then_some(new)
            .or_else(|| (name == new).then_some(old))
    })
}

/// Whether the outermost descriptions `a` and `b` of a kind of device are the same.
pub(crate) fn is_same_description(device: &str, a: &str, b: &str) -> bool {
    a == b
        || DESCRIPTIONS
            .iter()
            .any(|&(kind, old, new)| kind == device && is_pair((old, new), a, b))
}

/// Whether the fields `a` and `b` of a description are the same.
pub(crate) fn is_same_field(description: &str, a: &str, b: &str) -> bool {
    a == b
        || FIELDS
            .iter()
            .filter(|(name, _)| *name == description)
            .flat_map(|(_, pairs)| *pairs)
            .any(|&pair| is_pair(pair, a, b))
}

fn is_pair((old, new): (&str, &str), a: &str, b: &str) -> bool {
    (a == old && b == new) || (a == new && b == old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stands_for_its_other_one_in_both_directions_and_for_no_third() {
        assert_eq!(device("ICH9 LPC"), Some("ICH9-LPC"));
        assert_eq!(device("e1000"), Some("e1000-82540em"));
        assert_eq!(device("e1000e"), None);
        assert!(is_same_description("ich9-ahci", "ich9_ahci", "ahci"));
        assert!(!is_same_description("ahci", "ich9_ahci", "ahci"));
        assert!(is_same_field("piix4_pm", "gpe", "ar.gpe"));
        assert!(is_same_field("piix4_pm", "ar.gpe", "gpe"));
        assert!(!is_same_field("piix4_pm", "gpe", "pm1a.en"));
        assert!(!is_same_field("mch", "gpe", "ar.gpe"));
        assert!(is_same_field("anything", "x", "x"));
    }
}
