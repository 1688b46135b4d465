// A sortable table whose cells stay in place while rows change, so that focus and clicks survive updates.
// The server sorts and cuts it into pages; here is the page that is looked at.
export default {
  template: `
    <q-table flat binary-state-sort row-key="key" :rows="rows" :columns="columns" :aria-label="label"
             v-model:pagination="pagination" :rows-per-page-options="[size]" @request="look"
             :hide-bottom="total > 0 && total <= size" no-data-label="Nothing to show">
      <template v-slot:header-cell="cell">
        <q-th :props="cell" :aria-sort="order(cell.col)">
          <button v-if="cell.col.sortable" type="button" class="sort">{{ cell.col.label }}</button>
          <template v-else>{{ cell.col.label }}</template>
        </q-th>
      </template>
      <template v-slot:body-cell="cell">
        <q-td :props="cell">
          <span v-if="cell.col.kind === 'chip'" class="chip" :data-state="cell.value">{{ cell.value }}</span>
          <a v-else-if="cell.col.kind === 'link'" class="name" :href="cell.row.href">{{ cell.value }}</a>
          <q-btn v-else-if="cell.col.kind === 'lever' && cell.row.lever" flat dense no-caps size="13px"
                 :label="cell.row.lever" :aria-label="cell.row.lever + ' node ' + cell.row.key"
                 @click="$emit('lever', {node: cell.row.key, lever: cell.row.lever})"></q-btn>
          <div v-else :class="cell.col.kind">{{ text(cell) }}</div>
          <div v-if="cell.col.kind === 'progress'" aria-hidden="true"><i :style="{width: 100 * cell.value + '%'}"></i></div>
          <svg v-if="cell.col.kind === 'curve'" class="spark wide" viewBox="0 0 100 24" preserveAspectRatio="none" aria-hidden="true">
            <polyline :points="cell.row.spark"></polyline>
          </svg>
          <div v-if="cell.col.kind === 'link'"><span class="chip narrow" :data-state="cell.row.state">{{ cell.row.state }}</span></div>
          <div v-if="cell.col.why && cell.row.why" class="reason">{{ cell.row.why }}</div>
        </q-td>
      </template>
    </q-table>`,
  props: { rows: Array, total: Number, page: Number, columns: Array, label: String, size: Number },
  emits: ["lever", "look"],
  data() {
    return { pagination: { rowsPerPage: this.size, page: 1, rowsNumber: this.total, sortBy: null, descending: false } };
  },
  watch: {
    total(count) { this.pagination.rowsNumber = count; },
    page(number) { this.pagination.page = number; },
  },
  methods: {
    look({ pagination }) {
      this.pagination = pagination;
      this.$emit("look", { page: pagination.page, sortBy: pagination.sortBy, descending: pagination.descending });
    },
    // What a screen reader says of a column; its button sorts by mouse and by keyboard.
    order(col) {
      if (!col.sortable) return null;
      if (this.pagination.sortBy !== col.name) return "none";
      return this.pagination.descending ? "descending" : "ascending";
    },
    // What is shown stands beside what is sorted by.
    text(cell) {
      return cell.row[cell.col.name + "_text"] ?? cell.value;
    },
  },
};
