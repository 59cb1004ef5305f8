-- A VM's memory, kept while it is suspended: 'wanted' while it is being written, 'kept' once it counts. And why the last
-- attempt failed, if it did.
ALTER TABLE vms ADD COLUMN suspension TEXT CHECK (suspension IN ('wanted', 'kept'));
ALTER TABLE vms ADD COLUMN suspend_failure TEXT;
