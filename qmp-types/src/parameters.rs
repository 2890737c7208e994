//! Migration parameters: the numbers and choices of a migration.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::QmpError;
use crate::visit::{FromQapi, Place};

qapi_enum! {
    /// How multifd channels compress pages (`MultiFDCompression`).
    pub enum MultiFdCompression {
        /// Not at all.
        None = "none",
        /// zlib, one stream a channel.
        Zlib = "zlib",
        /// zstd, one stream a channel.
        Zstd = "zstd",
    }
}

qapi_enum! {
    /// Who looks for pages of zeroes (`ZeroPageDetection`).
    pub enum ZeroPageDetection {
        /// Nobody.
        None = "none",
        /// The main thread.
        Legacy = "legacy",
        /// The multifd threads, if there are any.
        Multifd = "multifd",
    }
}

qapi_enum! {
    /// What kind of migration it is (`MigMode`).
    pub enum MigMode {
        /// To another VM.
        Normal = "normal",
        /// Around a reboot of the host.
        CprReboot = "cpr-reboot",
        /// To another process on the same host.
        CprTransfer = "cpr-transfer",
        /// To the same process with another program.
        CprExec = "cpr-exec",
    }
}

/// A string that may be given as `null`, which is the empty string (`StrOrNull`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Option<String>")]
pub struct StrOrNull(pub String);

impl From<Option<String>> for StrOrNull {
    fn from(text: Option<String>) -> Self {
        Self(text.unwrap_or_default())
    }
}

impl FromQapi for StrOrNull {
    fn from_qapi(value: Value, place: &Place<'_>) -> Result<Self, QmpError> {
        match value {
            Value::Null => Ok(Self::default()),
            Value::String(text) => Ok(Self(text)),
            _ => Err(QmpError::wrong_type(&place.path(), "StrOrNull")),
        }
    }
}

/// How the dirty bitmaps of a block node are called in the stream (`BitmapMigrationNodeAlias`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapMigrationNodeAlias {
    /// The node here.
    pub node_name: String,
    /// Its name in the stream.
    pub alias: String,
    /// Its bitmaps.
    pub bitmaps: Vec<BitmapMigrationBitmapAlias>,
}

from_qapi_struct!(BitmapMigrationNodeAlias {
    node_name = "node-name",
    alias = "alias",
    bitmaps = "bitmaps",
});

/// How a dirty bitmap is called in the stream (`BitmapMigrationBitmapAlias`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapMigrationBitmapAlias {
    /// The bitmap here.
    pub name: String,
    /// Its name in the stream.
    pub alias: String,
    /// What changes on the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transform: Option<BitmapMigrationBitmapAliasTransform>,
}

from_qapi_struct!(BitmapMigrationBitmapAlias {
    name = "name",
    alias = "alias",
    transform = "transform",
});

/// What changes in a dirty bitmap on the way (`BitmapMigrationBitmapAliasTransform`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BitmapMigrationBitmapAliasTransform {
    /// Whether it is kept on disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
}

from_qapi_struct!(BitmapMigrationBitmapAliasTransform { persistent = "persistent" });

/// Both structs of the parameters, from one list.
macro_rules! parameters {
    ($(
        $(#[doc = $doc:literal])+
        $field:ident: $type:ty = $name:literal, $default:expr $(, skip $skip:literal)?;
    )+) => {
        /// Every parameter with its value: the answer to `query-migrate-parameters`.
        ///
        /// Read from a QEMU that lacks some of them, these have their defaults.
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Parameters {
            $($(#[doc = $doc])+ #[serde(rename = $name $(, skip_serializing_if = $skip)?)]
            pub $field: $type,)+
        }

        impl Default for Parameters {
            fn default() -> Self {
                Self { $($field: $default,)+ }
            }
        }

        /// The parameters to change: the arguments of `migrate-set-parameters`.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct MigrateSetParameters {
            $($(#[doc = $doc])+ #[serde(rename = $name, skip_serializing_if = "Option::is_none")]
            pub $field: Option<$type>,)+
        }

        from_qapi_struct!(MigrateSetParameters { $($field = $name,)+ });

        impl Parameters {
            /// The names of all parameters.
            pub const NAMES: &'static [&'static str] = &[$($name,)+];

            /// These with the changes, not checked.
            fn with(&self, changes: &MigrateSetParameters) -> Self {
                Self {
                    $($field: changes.$field.clone().unwrap_or_else(|| self.$field.clone()),)+
                }
            }

            /// The names of the parameters whose values differ.
            pub(crate) fn differing(&self, other: &Self) -> Vec<&'static str> {
                let mut names = Vec::new();
                $(if self.$field != other.$field {
                    names.push($name);
                })+
                names
            }
        }
    };
}

parameters! {
    /// Before the first announcement of the guest's addresses, ms.
    announce_initial: u64 = "announce-initial", 50;
    /// At most between two announcements, ms.
    announce_max: u64 = "announce-max", 550;
    /// How many announcements.
    announce_rounds: u64 = "announce-rounds", 5;
    /// By how much the time between announcements grows, ms.
    announce_step: u64 = "announce-step", 100;
    /// Dirtied to transferred, %, from which throttling starts.
    throttle_trigger_threshold: u8 = "throttle-trigger-threshold", 50;
    /// First throttling, %.
    cpu_throttle_initial: u8 = "cpu-throttle-initial", 20;
    /// By how much throttling grows, %.
    cpu_throttle_increment: u8 = "cpu-throttle-increment", 10;
    /// Whether throttling grows less towards the end.
    cpu_throttle_tailslow: bool = "cpu-throttle-tailslow", false;
    /// Id of the TLS credentials; empty: no TLS.
    tls_creds: StrOrNull = "tls-creds", StrOrNull::default();
    /// Name the peer's certificate must have, if not the address'.
    tls_hostname: StrOrNull = "tls-hostname", StrOrNull::default();
    /// Id of the object that says which clients may connect.
    tls_authz: StrOrNull = "tls-authz", StrOrNull::default();
    /// Limit, bytes a second; 0: none.
    max_bandwidth: u64 = "max-bandwidth", 128 << 20;
    /// Bandwidth to assume for the hand-over, bytes a second; 0: measure.
    avail_switchover_bandwidth: u64 = "avail-switchover-bandwidth", 0;
    /// How long the guest may stand still at the hand-over, ms.
    downtime_limit: u64 = "downtime-limit", 300;
    /// Between two COLO checkpoints, ms.
    x_checkpoint_delay: u32 = "x-checkpoint-delay", 20_000;
    /// How many multifd channels.
    multifd_channels: u8 = "multifd-channels", 2;
    /// How they compress.
    multifd_compression: MultiFdCompression = "multifd-compression", MultiFdCompression::None;
    /// Level of zlib, 0 to 9.
    multifd_zlib_level: u8 = "multifd-zlib-level", 1;
    /// Level of QATzip, 1 to 9.
    multifd_qatzip_level: u8 = "multifd-qatzip-level", 1;
    /// Level of zstd, 0 to 20.
    multifd_zstd_level: u8 = "multifd-zstd-level", 1;
    /// Memory for XBZRLE's old pages, bytes.
    xbzrle_cache_size: u64 = "xbzrle-cache-size", 64 << 20;
    /// Limit for what postcopy sends unasked, bytes a second; 0: none.
    max_postcopy_bandwidth: u64 = "max-postcopy-bandwidth", 0;
    /// Most throttling, %.
    max_cpu_throttle: u8 = "max-cpu-throttle", 99;
    /// Names of dirty bitmaps in the stream.
    block_bitmap_mapping: Option<Vec<BitmapMigrationNodeAlias>> = "block-bitmap-mapping", None,
        skip "Option::is_none";
    /// Period of the dirty limit, ms.
    x_vcpu_dirty_limit_period: u64 = "x-vcpu-dirty-limit-period", 1000;
    /// Dirty limit of a vCPU, MB/s.
    vcpu_dirty_limit: u64 = "vcpu-dirty-limit", 1;
    /// What kind of migration.
    mode: MigMode = "mode", MigMode::Normal;
    /// Who looks for pages of zeroes.
    zero_page_detection: ZeroPageDetection = "zero-page-detection", ZeroPageDetection::Multifd;
    /// `O_DIRECT` for files.
    direct_io: bool = "direct-io", false;
    /// Size of RDMA's chunks, bytes.
    x_rdma_chunk_size: u64 = "x-rdma-chunk-size", 1 << 20;
    /// Program and arguments of mode `cpr-exec`.
    cpr_exec_command: Vec<String> = "cpr-exec-command", Vec::new();
}

/// Smallest page an XBZRLE cache could hold, bytes.
const TARGET_PAGE_SIZE: u64 = 4096;

impl Parameters {
    /// The parameters after a change. Either all of it holds or nothing.
    ///
    /// # Errors
    /// A value out of its range: "Option NAME expects …".
    pub fn apply(&self, changes: &MigrateSetParameters) -> Result<Self, QmpError> {
        let new = self.with(changes);
        new.check()?;
        Ok(new)
    }

    fn check(&self) -> Result<(), QmpError> {
        let rules = [
            (
                (1..=100).contains(&self.throttle_trigger_threshold),
                "throttle-trigger-threshold",
                "an integer in the range of 1 to 100",
            ),
            (
                (1..=99).contains(&self.cpu_throttle_initial),
                "cpu-throttle-initial",
                "an integer in the range of 1 to 99",
            ),
            (
                (1..=99).contains(&self.cpu_throttle_increment),
                "cpu-throttle-increment",
                "an integer in the range of 1 to 99",
            ),
            (
                self.downtime_limit <= 2_000_000,
                "downtime-limit",
                "an integer in the range of 0 to 2000000 ms",
            ),
            (
                self.multifd_channels >= 1,
                "multifd-channels",
                "a value between 1 and 255",
            ),
            (
                self.multifd_zlib_level <= 9,
                "multifd-zlib-level",
                "a value between 0 and 9",
            ),
            (
                (1..=9).contains(&self.multifd_qatzip_level),
                "multifd-qatzip-level",
                "a value between 1 and 9",
            ),
            (
                self.multifd_zstd_level <= 20,
                "multifd-zstd-level",
                "a value between 0 and 20",
            ),
            (
                self.xbzrle_cache_size >= TARGET_PAGE_SIZE
                    && self.xbzrle_cache_size.is_power_of_two(),
                "xbzrle-cache-size",
                "a power of two no less than the target page size",
            ),
            (
                (self.cpu_throttle_initial..=99).contains(&self.max_cpu_throttle),
                "max-cpu-throttle",
                "an integer in the range of cpu-throttle-initial to 99",
            ),
            (
                self.announce_initial <= 100_000,
                "announce-initial",
                "a value between 0 and 100000",
            ),
            (
                self.announce_max <= 100_000,
                "announce-max",
                "a value between 0 and 100000",
            ),
            (
                self.announce_rounds <= 1000,
                "announce-rounds",
                "a value between 0 and 1000",
            ),
            (
                (1..=10_000).contains(&self.announce_step),
                "announce-step",
                "a value between 1 and 10000",
            ),
            (
                (1..=1000).contains(&self.x_vcpu_dirty_limit_period),
                "x-vcpu-dirty-limit-period",
                "a value between 1 and 1000",
            ),
            (
                self.vcpu_dirty_limit >= 1,
                "vcpu-dirty-limit",
                "a value of at least 1 MB/s",
            ),
            (
                self.x_rdma_chunk_size.is_power_of_two()
                    && (1 << 20..=1 << 30).contains(&self.x_rdma_chunk_size),
                "x-rdma-chunk-size",
                "a power of 2 in the range 1MiB to 1024MiB",
            ),
        ];
        match rules.iter().find(|(holds, ..)| !holds) {
            Some((_, name, expects)) => Err(QmpError::option_expects(name, expects)),
            None => Ok(()),
        }
    }
}
