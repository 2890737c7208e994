//! What can be yanked: connections that hang and are to be cut.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::QmpError;
use crate::visit::{FromQapi, Members, Place};

qapi_enum! {
    /// The kinds of instances (`YankInstanceType`).
    pub enum YankInstanceType {
        /// A block node.
        BlockNode = "block-node",
        /// A character device.
        Chardev = "chardev",
        /// The migration.
        Migration = "migration",
    }
}

/// Something whose connections can be shut down (`YankInstance`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "type",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case"
)]
pub enum YankInstance {
    /// A block node.
    BlockNode {
        /// Its name.
        node_name: String,
    },
    /// A character device.
    Chardev {
        /// Its id.
        id: String,
    },
    /// The migration, all its channels.
    Migration,
}

impl FromQapi for YankInstance {
    fn from_qapi(value: Value, place: &Place<'_>) -> Result<Self, QmpError> {
        let mut members = Members::new(value, place)?;
        let this = match members.take("type")? {
            YankInstanceType::BlockNode => Self::BlockNode {
                node_name: members.take("node-name")?,
            },
            YankInstanceType::Chardev => Self::Chardev {
                id: members.take("id")?,
            },
            YankInstanceType::Migration => Self::Migration,
        };
        members.finish()?;
        Ok(this)
    }
}
